"""Prints tables of names and values, prompts, and the results of a run.

Text goes to the standard output. The same content is kept as facts, which `--json` prints instead.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llmrec import progress, terminal

if TYPE_CHECKING:
    from rich.console import Console

facts: dict[str, object] = {}
"""The facts that the command of this process has stored so far, by name."""
given_options: list[str] = []
"""The shared options on the command line, to pass to the same command in another process; without ``--json``."""


# Keys that are not printed: they are in results.json, which the output names.
_UNPRINTED_KEYS = {"slices", "by_position", "position_bias"}


def show_run_results(done: Any) -> None:
    """Print the main results of a run, its duration, the path of its report, and the next command."""
    from rich.text import Text

    from llmrec.report.results import parse_results
    from llmrec.report.summary import main_finding
    from llmrec.report.verdicts import closing_lines, describe_run_time, metrics_table, verdict_patterns

    result = parse_results(done.results)
    sentence = main_finding(result)
    rich_console().print(metrics_table(result))
    say("")
    verdicts = Text("\n".join(closing_lines(result)))
    for pattern, style in verdict_patterns():
        verdicts.highlight_regex(pattern, style)
    rich_console().print(verdicts, soft_wrap=True)
    say("")
    budget = {entry["stage"]: entry["seconds"] for entry in done.results["budget"]}
    store_facts(
        name=result.name,
        budget={**budget, "total": done.results["seconds"]},
        headline=result.headline,
        rows=[{key: row[key] for key in row if key not in _UNPRINTED_KEYS} for row in done.results["rows"]],
        comparisons=done.results["comparisons"],
        notes=[sentence] if sentence else [],
    )
    say(f"time: {describe_run_time(result)}")
    show_written_files({"results": done.folder / "results.json", "report": done.report})
    say(f"all tables: llmrec report {shlex.quote(str(done.folder))} --table")
    if (done.folder / "merged").is_dir() or any(row.fusion for row in result.rows):
        say(f"serve it: llmrec serve {shlex.quote(str(done.folder))}")


def show_shard(folder: Path, target: Path) -> Mapping[str, Any]:
    """Print the state of a shard and the command that merges shards; return the record of the shard."""
    from llmrec.pipeline.shards import read_shard

    done = read_shard(folder)
    counts = {name: f"{done.facts[name]:,}" for name in ("lines", "failed", "answers", "texts") if name in done.facts}
    seconds = ", ".join(f"{name} {spent:.1f}" for name, spent in done.facts["seconds"].items())
    rows = {**counts, "seconds": seconds, "folder": str(folder)}
    last = f"when all {done.shard.count} are done: llmrec merge {shlex.quote(str(target))}"
    show_values(f"shard {done.shard}", rows, record={"shard": {**done.facts, "of": str(done.shard), "folder": folder}})
    say(last)
    return done.facts


def show_tables(folder: Path) -> None:
    """Print the result tables of a run folder."""
    from llmrec.report.results import parse_results, read_results_json
    from llmrec.report.table import console_tables

    for table in console_tables(parse_results(read_results_json(folder))):
        rich_console().print(table, "")


def rich_console() -> Console:
    """Return the rich console that prints tables and colours to the output of a command."""
    from rich.console import Console

    # a pipe has no width
    stream = terminal.out()
    return Console(file=stream, width=None if stream.isatty() else 80, highlight=False)


def show_prompts(prompts: Mapping[str, Sequence[str]]) -> None:
    """Print rendered prompts by title."""
    store_facts(prompts=prompts)
    for texts in prompts.values():
        for text in texts:
            say(text + "\n")


def store_facts(**values: Any) -> None:
    """Store values for the machine-readable output of `--json`."""
    facts.update(values)


def format_json(value: Any) -> str:
    """Return values as JSON: records become objects, paths and dates become strings, and NaN becomes null."""
    # Imported here, because printing a help text should not load it.
    from pydantic_core import to_jsonable_python

    plain = to_jsonable_python(value, inf_nan_mode="null", fallback=_to_plain_value)
    return json.dumps(plain, ensure_ascii=False, indent=1, allow_nan=False)


def _to_plain_value(value: Any) -> Any:
    """Convert a value of a type that pydantic does not know."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def show_values(
    title: str,
    rows: Mapping[str, Any],
    form: Callable[[Any], str] = str,
    record: Mapping[str, Any] | None = None,
    file: TextIO | None = None,
) -> None:
    """Print a title, then names with their values.

    Args:
        title: The title.
        rows: Values by name.
        form: Formats a value.
        record: The facts to store; None for the rows, under their title.
        file: The output stream; None for the standard output.
    """
    store_facts(**({title: rows} if record is None else record))
    width = max((len(name) for name in rows), default=0)
    for line in (title, *(f"  {name:<{width}}  {form(value)}" for name, value in rows.items())):
        progress.say(line, file or terminal.out())


def show_written_files(files: Mapping[str, Any]) -> None:
    """Print the files that were written, with their descriptions."""
    store_facts(**files)
    say("\n".join(f"{name}: {path}" for name, path in files.items()))


def format_number(value: Any) -> str:
    """Return a number with thousands separators."""
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def format_minutes(seconds: float) -> str:
    """Return seconds as full minutes, at least one."""
    count = max(1, round(seconds / 60))
    return f"{count} minute{'s' if count > 1 else ''}"


def say_if_verbose(text: str) -> None:
    """Print a line if ``-v`` is set."""
    if logging.getLogger("llmrec").isEnabledFor(logging.INFO):
        say(text)


def say(text: str) -> None:
    """Print a line."""
    progress.say(text, terminal.out())
