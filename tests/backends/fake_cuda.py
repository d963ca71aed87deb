"""A fake CUDA device: tensors that report ``cuda:0``, hold CPU data, and cannot be mixed with CPU tensors.

Eager CUDA raises an error if an operation mixes tensors of two devices, or if numpy reads a CUDA tensor. These tensors
do the same, which reveals such bugs on machines without a GPU. Kernels, memory and speed are not simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# Operations that may mix devices: indexing, the source of a copy, and functions that only inspect a tensor.
_MEETS = {"__getitem__", "__setitem__", "index_put_", "copy_", "to", "type_as", "is_tensor"}


class FakeCuda(torch.Tensor):
    """A tensor on the fake device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


@contextmanager
def fake_cuda() -> Iterator[Callable[[Any], Any]]:
    """Yield a function that moves a model or tensor to ``cuda:0``; new tensors for ``cuda`` are on it too."""
    to = torch.nn.Module.to

    def moved(module: Any, *args: Any, **kwargs: Any) -> Any:
        # `Module.to` keeps the parameters, which are plain tensors, and changes their data.
        on_gpu = next((each for each in args if isinstance(each, str | torch.device)), None)
        return on_cuda(module) if _is_cuda(on_gpu) else to(module, *args, **kwargs)

    torch.nn.Module.to = moved  # type: ignore[method-assign]
    try:
        with _Mode():
            yield on_cuda
    finally:
        torch.nn.Module.to = to  # type: ignore[method-assign]


def on_cuda(value: Any) -> Any:
    """Move a model (in place) or a tensor to the fake device."""
    if isinstance(value, torch.Tensor):
        return _wrapped(value)
    with torch._C.DisableTorchFunction():
        for module in value.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = _parameter(parameter)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _wrapped(buffer)
    return value


_SEEN: dict[int, Any] = {}


def _parameter(parameter: Any) -> Any:
    # Tied weights stay one tensor.
    if isinstance(parameter, FakeCuda):
        return parameter
    if id(parameter) not in _SEEN:
        moved = torch.Tensor._make_subclass(FakeCuda, parameter.data, parameter.requires_grad)
        moved._is_param = True
        _SEEN[id(parameter)] = (parameter, moved)
    return _SEEN[id(parameter)][1]


def _wrapped(value: Any) -> Any:
    return value if isinstance(value, FakeCuda) else value.as_subclass(FakeCuda)


def _is_cuda(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"  # type: ignore[arg-type]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        values = [_mapped(each, change) for each in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    return value


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(func, "__name__", "")
    with torch._C.DisableTorchFunction():
        leaves = list(_leaves((args, kwargs)))
        fakes = [leaf for leaf in leaves if isinstance(leaf, FakeCuda)]
        if name == "__get__" and func.__self__ is torch.Tensor.device:
            return CUDA if fakes else func(*args)
        if name == "__get__" and func.__self__ is torch.Tensor.is_cuda:
            return bool(fakes)
        if name in ("__get__", "__set__"):
            # Attributes such as the gradient belong to the tensor itself, not to another view of its data.
            return _mapped(func(*args, **kwargs), _wrapped if fakes else lambda leaf: leaf)
        if name == "requires_grad_":
            return func(*args, **kwargs)
        if name in ("numpy", "__array__") and fakes:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        result_on_gpu = bool(fakes)
        if fakes and name not in _MEETS:
            _refuse_mixed(name, leaves)
        if name in ("__getitem__", "__setitem__") and not isinstance(args[0], FakeCuda):
            if any(leaf.dim() for leaf in _leaves(args[1]) if isinstance(leaf, FakeCuda)):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            result_on_gpu = False
        args, kwargs, on_gpu = _placed(name, args, dict(kwargs))
        result_on_gpu = on_gpu if on_gpu is not None else result_on_gpu
        plain: dict[int, Any] = {}

        def bare(leaf: Any) -> Any:
            if not isinstance(leaf, FakeCuda):
                return leaf
            return plain.setdefault(id(leaf), leaf.as_subclass(torch.Tensor))

        before = {id(bare(leaf)): leaf for leaf in fakes}
        value = func(*_mapped(args, bare), **_mapped(kwargs, bare))
        if not result_on_gpu:
            return value
        return _mapped(value, lambda leaf: before.get(id(leaf)) if id(leaf) in before else _wrapped(leaf))


def _refuse_mixed(name: str, leaves: list[Any]) -> None:
    """Reject operations on two devices; CPU scalars are allowed everywhere."""
    strangers = [leaf for leaf in leaves if not isinstance(leaf, FakeCuda) and leaf.dim()]
    if strangers:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu")


def _placed(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], bool | None]:
    """Return arguments without the fake device, and whether they place the result on it (None: unspecified)."""
    on_gpu: bool | None = None
    if kwargs.get("device") is not None:
        on_gpu = _is_cuda(kwargs["device"])
        kwargs["device"] = CPU
    if name in ("cuda", "cpu") and args and isinstance(args[0], torch.Tensor):
        on_gpu = name == "cuda"
    if name == "to":
        rest = []
        for each in args[1:]:
            if isinstance(each, torch.device | str | int) and not isinstance(each, bool):
                on_gpu = _is_cuda(each)
                continue
            if isinstance(each, torch.Tensor):
                on_gpu = isinstance(each, FakeCuda)
            rest.append(each)
        args = (args[0], *rest) if rest or kwargs else (args[0], CPU)
    return args, kwargs, on_gpu
