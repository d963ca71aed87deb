"""What commands print: tables of names and values, a run's results, and the estimate of a dry run.

Words go to the standard output. What they say is kept as facts beside them, which `--json` prints in their place.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llmrec import progress, terminal
from llmrec.errors import LlmrecError

if TYPE_CHECKING:
    from rich.console import Console

facts: dict[str, object] = {}
"""What the command of this process has told so far, by name."""


# Of a row: they stand in results.json, which is named.
_DETAILS = {"slices", "by_position", "position_bias"}

LARGE = 1_000_000
"""Interactions from which on a run says what it will take before it begins."""


def finish(done: Any) -> None:
    """Print the headline figures of a run, how long it took, where its report lies, and what to do next."""
    from rich.text import Text

    from llmrec.report.results import results_of
    from llmrec.report.summary import first_sentence
    from llmrec.report.verdicts import coloured, metrics_table, screen, spent

    found = results_of(done.results)
    sentence = first_sentence(found)
    console().print(metrics_table(found))
    say("")
    verdicts = Text("\n".join(screen(found)))
    for pattern, style in coloured():
        verdicts.highlight_regex(pattern, style)
    console().print(verdicts, soft_wrap=True)
    say("")
    budget = {entry["stage"]: entry["seconds"] for entry in done.results["budget"]}
    tell(
        name=found.name,
        budget={**budget, "total": done.results["seconds"]},
        headline=found.headline,
        rows=[{key: row[key] for key in row if key not in _DETAILS} for row in done.results["rows"]],
        comparisons=done.results["comparisons"],
        notes=[sentence] if sentence else [],
    )
    say(f"time: {spent(found)}")
    written({"results": done.folder / "results.json", "report": done.report})
    say(f"all tables: llmrec report {shlex.quote(str(done.folder))} --table")
    if (done.folder / "merged").is_dir() or any(row.fusion for row in found.rows):
        say(f"serve it: llmrec serve {shlex.quote(str(done.folder))}")


def show_shard(folder: Path, target: Path) -> Mapping[str, Any]:
    """Print what became of a shard, and how its job is put together; return what it says of itself."""
    from llmrec.pipeline.shards import read

    done = read(folder)
    counts = {name: f"{done.told[name]:,}" for name in ("lines", "failed", "answers", "texts") if name in done.told}
    seconds = ", ".join(f"{name} {spent:.1f}" for name, spent in done.told["seconds"].items())
    rows = {**counts, "seconds": seconds, "folder": str(folder)}
    last = f"when all {done.shard.count} are done: llmrec merge {shlex.quote(str(target))}"
    show(f"shard {done.shard}", rows, told={"shard": {**done.told, "of": str(done.shard), "folder": folder}})
    say(last)
    return done.told


def show_tables(folder: Path) -> None:
    """Print the tables of a run folder."""
    from llmrec.report.results import content_of
    from llmrec.report.table import console_tables

    for table in console_tables(content_of(folder)):
        console().print(table, "")


def console() -> Console:
    """Return what prints tables and colours where a command answers."""
    from rich.console import Console

    # What is piped has no width of its own.
    stream = terminal.out()
    return Console(file=stream, width=None if stream.isatty() else 80, highlight=False)


def show_dry_run(study: Any) -> None:
    """Print rendered prompts, training rows, and an estimate of time and memory."""
    from llmrec.cli.show.prompts import by_task
    from llmrec.models.load import resolve
    from llmrec.pipeline.study import encoder_of

    base = resolve(study.recipe.model, seed=study.recipe.seed)
    encoder = encoder_of(study, base)
    show_prompts(by_task(study, encoder))
    show_estimate(study, encoder, base)


def tell_before(session: Any) -> None:
    """Print the estimate of a run that is about to begin, where it is a long one or a server is to be paid."""
    recipe = session.study.recipe
    if session.model is None:
        return
    if recipe.eval.backend == "openai" or len(session.study.data.dataset.interactions) >= LARGE:
        try:
            show_estimate(session.study, session.encoder, session.base)
        except LlmrecError as error:
            say(f"no estimate: {error}")


def show_estimate(study: Any, encoder: Any, base: str) -> None:
    """Print what is trained on and asked, and an estimate of time, memory, and tokens of a server."""
    from llmrec.cli.show import estimate

    rows = estimate.train_rows(study, encoder, base) if "tuned" in study.recipe.eval.arms else {}
    if rows:
        show("training rows", rows, json.dumps)
    found = estimate.estimate(study, encoder, base, rows)
    arms = {
        f"{arm}: about": f"{work.tokens:,} tokens"
        + (f", {found.eval_seconds[arm]:.0f} s" if found.eval_seconds else "")
        for arm, work in found.eval_work.items()
    }
    lines = {
        "parameters": f"{found.parameters:,}",
        "training: about": f"{found.train_tokens:,} tokens, {found.train_seconds:.0f} s",
        **arms,
        "together: about": minutes(sum(found.stages.values())),
        "memory: about": f"{found.memory_gb} GiB" + _of_gpu(found.memory_gb, found.free_gb),
    }
    if study.recipe.eval.backend == "openai":
        asked, written = (
            sum(getattr(work, name) for work in found.eval_work.values()) for name in ("asked", "written")
        )
        cost = "" if found.cost is None else f", which cost {found.cost:.2f} by eval.server's prices"
        lines["the server: about"] = f"{asked:,.0f} tokens read and {written:,.0f} written{cost}"
    show("estimate", lines, told={"estimate": found})


def _of_gpu(needed: float, free: float | None) -> str:
    """Compare an estimate with the memory of the GPU that is free; None: there is no GPU."""
    if free is None:
        return ""
    fix = "set train.gradient_checkpointing=true, lower train.batch_tokens, or set train.method=qlora"
    return f" of the GPU, {free} GiB of which are free" + (f": too little; {fix}" if needed > free else "")


def minutes(seconds: float) -> str:
    """Return seconds as minutes, one at least."""
    count = max(1, round(seconds / 60))
    return f"{count} minute{'s' if count > 1 else ''}"


def show_prompts(prompts: Mapping[str, Sequence[str]]) -> None:
    """Print rendered prompts, by what they are of."""
    tell(prompts=prompts)
    for texts in prompts.values():
        for text in texts:
            say(text + "\n")


def tell(**found: Any) -> None:
    """Keep facts: what a program reads where a person reads words."""
    facts.update(found)


def as_json(value: Any) -> str:
    """Return facts as JSON: records as objects, paths and dates as texts, and no NaN."""
    return json.dumps(_plain(value), ensure_ascii=False, indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, date):
        return value.isoformat()
    return value if isinstance(value, str | int | None) else str(value)


def show(
    title: str,
    rows: Mapping[str, Any],
    form: Callable[[Any], str] = str,
    told: Mapping[str, Any] | None = None,
    file: TextIO | None = None,
) -> None:
    """Print a title, and names with their values below it.

    Args:
        title: The title.
        rows: Values by name.
        form: How a value is written.
        told: The facts that are kept; None: the rows, under their title.
        file: Where it is printed; None: the standard output.
    """
    tell(**({title: rows} if told is None else told))
    width = max((len(name) for name in rows), default=0)
    for line in (title, *(f"  {name:<{width}}  {form(value)}" for name, value in rows.items())):
        progress.say(line, file or terminal.out())


def written(files: Mapping[str, Any]) -> None:
    """Say which files were written, by what each is."""
    tell(**files)
    say("\n".join(f"{name}: {path}" for name, path in files.items()))


def short(value: Any) -> str:
    """Return a figure with its thousands apart."""
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def detail(text: str) -> None:
    """Print a line that only ``-v`` asks for."""
    if logging.getLogger("llmrec").isEnabledFor(logging.INFO):
        say(text)


def say(text: str) -> None:
    """Print a line."""
    progress.say(text, terminal.out())
