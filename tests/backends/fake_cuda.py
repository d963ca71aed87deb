"""A device that is not there: tensors that say ``cuda:0``, hold CPU data, and refuse to meet CPU tensors.

Eager CUDA raises where tensors of two devices meet in one operation, and where a CUDA tensor is read by numpy. So do
these, which finds such mistakes on machines without a GPU. Kernels, memory and speed are not simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# What may meet tensors of another device: an index, the source of a copy, and what only looks at a tensor.
_MEETS = {"__getitem__", "__setitem__", "index_put_", "copy_", "to", "type_as", "is_tensor"}


class FakeCuda(torch.Tensor):
    """A tensor on the device that is not there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


@contextmanager
def fake_cuda() -> Iterator[Callable[[Any], Any]]:
    """Give a function that puts a model or tensor on ``cuda:0``; tensors made for ``cuda`` inside are there too."""
    to = torch.nn.Module.to

    def moved(module: Any, *args: Any, **kwargs: Any) -> Any:
        # A module's own `to` keeps its parameters, which are plain tensors, and changes their data.
        told = next((each for each in args if isinstance(each, str | torch.device)), None)
        return on_cuda(module) if _is_cuda(told) else to(module, *args, **kwargs)

    torch.nn.Module.to = moved  # type: ignore[method-assign]
    try:
        with _Mode():
            yield on_cuda
    finally:
        torch.nn.Module.to = to  # type: ignore[method-assign]


def on_cuda(found: Any) -> Any:
    """Put a model, in place, or a tensor on the device."""
    if isinstance(found, torch.Tensor):
        return _wrapped(found)
    with torch._C.DisableTorchFunction():
        for module in found.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = _parameter(parameter)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _wrapped(buffer)
    return found


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


def _wrapped(found: Any) -> Any:
    return found if isinstance(found, FakeCuda) else found.as_subclass(FakeCuda)


def _is_cuda(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"  # type: ignore[arg-type]


def _leaves(found: Any) -> Iterator[Any]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for each in found:
            yield from _leaves(each)
    elif isinstance(found, dict):
        yield from _leaves(list(found.values()))


def _mapped(found: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(found, torch.Tensor):
        return change(found)
    if isinstance(found, list | tuple):
        values = [_mapped(each, change) for each in found]
        return type(found)(*values) if hasattr(found, "_fields") else type(found)(values)
    if isinstance(found, dict):
        return {key: _mapped(each, change) for key, each in found.items()}
    return found


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
            # Attributes such as the gradient are those of the tensor itself, and not of another view of its data.
            return _mapped(func(*args, **kwargs), _wrapped if fakes else lambda leaf: leaf)
        if name == "requires_grad_":
            return func(*args, **kwargs)
        if name in ("numpy", "__array__") and fakes:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        here = bool(fakes)
        if fakes and name not in _MEETS:
            _refuse_mixed(name, leaves)
        if name in ("__getitem__", "__setitem__") and not isinstance(args[0], FakeCuda):
            if any(leaf.dim() for leaf in _leaves(args[1]) if isinstance(leaf, FakeCuda)):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            here = False
        args, kwargs, told = _placed(name, args, dict(kwargs))
        here = told if told is not None else here
        plain: dict[int, Any] = {}

        def bare(leaf: Any) -> Any:
            if not isinstance(leaf, FakeCuda):
                return leaf
            return plain.setdefault(id(leaf), leaf.as_subclass(torch.Tensor))

        before = {id(bare(leaf)): leaf for leaf in fakes}
        found = func(*_mapped(args, bare), **_mapped(kwargs, bare))
        if not here:
            return found
        return _mapped(found, lambda leaf: before.get(id(leaf)) if id(leaf) in before else _wrapped(leaf))


def _refuse_mixed(name: str, leaves: list[Any]) -> None:
    """Refuse operations on two devices; single numbers of the CPU are welcome everywhere."""
    strangers = [leaf for leaf in leaves if not isinstance(leaf, FakeCuda) and leaf.dim()]
    if strangers:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu")


def _placed(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], bool | None]:
    """Return arguments without the device that is not there, and whether the result is on it, where they say so."""
    told: bool | None = None
    if kwargs.get("device") is not None:
        told = _is_cuda(kwargs["device"])
        kwargs["device"] = CPU
    if name in ("cuda", "cpu") and args and isinstance(args[0], torch.Tensor):
        told = name == "cuda"
    if name == "to":
        rest = []
        for each in args[1:]:
            if isinstance(each, torch.device | str | int) and not isinstance(each, bool):
                told = _is_cuda(each)
                continue
            if isinstance(each, torch.Tensor):
                told = isinstance(each, FakeCuda)
            rest.append(each)
        args = (args[0], *rest) if rest or kwargs else (args[0], CPU)
    return args, kwargs, told
