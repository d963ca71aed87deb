"""Writes a run's report folder: one HTML page, its scripts, a Markdown page and a CSV table.

The page loads nothing from any network. Its Content-Security-Policy admits only scripts and styles that carry a
nonce, and the nonce is a hash over the data, so that no title or model output can contain it.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmrec.durable import replacing
from llmrec.report import wording
from llmrec.report.plots import page_json, plots
from llmrec.report.results import LOWER_IS_BETTER, Results, failure_reasons, read
from llmrec.report.table import cell, csv_text, grid, markdown

_HERE = Path(__file__).resolve().parent
_LONGEST = 20_000  # characters of one prompt or raw answer on the page


def write(run_dir: Path) -> dict[str, Path]:
    """Read ``results.json`` and ``predictions.parquet`` of a run and write ``run_dir/report``.

    Each file is written beside its place and moved there, so a reader never sees half of one.

    Returns:
        The written files under ``html``, ``markdown`` and ``csv``.

    Raises:
        DataError: If one of the two files is missing or cannot be read.
        LlmrecError: If rows of different protocols, or a task without a baseline, would stand in one table.
    """
    run_dir = Path(run_dir)
    results = read(run_dir)
    reasons = failure_reasons(run_dir, results)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    plotly = files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    pages = {"html": folder / "index.html", "markdown": folder / "report.md", "csv": folder / "table.csv"}
    _put(folder / "plotly.min.js", plotly)
    _put(folder / "report.js", (_HERE / "report.js").read_bytes())
    _put(pages["csv"], csv_text(results).encode())
    _put(pages["markdown"], markdown_page(results).encode())
    _put(pages["html"], html_page(results, reasons, inline_styles=_inline_styles(plotly)).encode())
    return pages


def _put(path: Path, content: bytes) -> None:
    """Write a file in one step, unless it is there already."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with replacing(path) as draft:
        draft.write_bytes(content)


def _inline_styles(plotly: bytes) -> list[str]:
    """Return ids of style elements that plotly.js would add, which the page's policy forbids unless they exist."""
    marked = re.findall(rb'getElementById\("([0-9a-f]{64})"\)', plotly)
    return ["plotly.js-style-global", *(name.decode() for name in marked)]


# --------------------------------------------------------------------------- HTML


def html_page(results: Results, reasons: dict[str, dict[str, int]], *, inline_styles: list[str]) -> str:
    """Render the page.

    Args:
        results: Checked results.
        reasons: Row id to failure reason to count.
        inline_styles: Ids of empty style elements to put in the head.
    """
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.globals["interval"] = wording.interval
    environment.filters.update(
        number=wording.number, share=wording.share, count=wording.count, p=wording.p_value,
        duration=wording.duration, label=wording.label, title_of=wording.title, short_template=wording.short_template,
        clip=clip, answer=answer, dump=dump,
    )  # fmt: skip
    data = page_json(plots(results))
    nonce = hashlib.sha256(results.model_dump_json().encode()).hexdigest()[:32]
    verdicts = {task: wording.verdict(results, task) for task in results.tasks}
    return environment.get_template("page.html.j2").render(
        results=results, reasons=reasons, nonce=nonce, data=data, style=(_HERE / "style.css").read_text("utf-8"),
        inline_styles=inline_styles, lower=LOWER_IS_BETTER, verdicts=verdicts, summary=wording.summary(results),
        winner={task: wording.winner_sentence(found) for task, found in verdicts.items()},
        tuning={task: wording.tuning_sentence(found, results.rows) for task, found in verdicts.items()},
        signatures=signatures(results), arms=cost_by_arm(results), made=made_data(results),
    )  # fmt: skip


def _shown(value: object) -> object:
    """Write out control characters in every plain string that enters the page; finished markup stays as it is."""
    return wording.visible(value) if type(value) is str else value


def clip(text: str) -> str:
    """Return text, cut where it would swamp the page; the cut is said."""
    more = len(text) - _LONGEST
    return f"{text[:_LONGEST]}\n[… {wording.count(more)} more characters]" if more > 0 else text


def answer(value: object) -> str:
    """Return a parsed answer or a truth as text: strings as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def dump(value: object) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=88)


def signatures(results: Results) -> dict[str, dict[str, list[str]]]:
    """Return each task's protocols, which all its rows share, with the metrics measured under them."""
    found: dict[str, dict[str, list[str]]] = {}
    for task in results.tasks:
        for row in results.rows:
            for name, metric in row.metrics.items() if row.task == task else ():
                protocol = metric.signature.removeprefix(f"{name}|")
                names = found.setdefault(task, {}).setdefault(protocol, [])
                if name not in names:
                    names.append(name)
    return found


def cost_by_arm(results: Results) -> list[dict[str, Any]]:
    """Add up rows, requests, tokens and seconds of each arm."""
    found = []
    for arm in ("zero-shot", "few-shot", "tuned", "baseline"):
        rows = [row for row in results.rows if row.arm == arm]
        if rows:
            read_tokens = sum(row.cost.prompt_tokens for row in rows)
            written = sum(row.cost.completion_tokens for row in rows)
            seconds = sum(row.cost.seconds or 0.0 for row in rows)
            rate = (read_tokens + written) / seconds if seconds and read_tokens + written else None
            found.append(
                {
                    "arm": arm, "rows": len(rows), "requests": sum(row.n for row in rows), "read": read_tokens,
                    "written": written, "seconds": seconds, "rate": rate,
                }
            )  # fmt: skip
    return found


def made_data(results: Results) -> list[str]:
    """Return the names of data sets that were made up, not collected."""
    return list(dict.fromkeys(data.name for data in results.data.values() if data and data.made))


# --------------------------------------------------------------------------- Markdown


def markdown_page(results: Results) -> str:
    """Return the report as Markdown: summary, tables, costs, protocol and notes."""
    name = cell(str(results.recipe.get("name", "Report")))
    parts = [f"# {name}", cell(wording.summary(results))]
    for task in results.tasks:
        found = wording.verdict(results, task)
        said = f"{wording.winner_sentence(found)} {wording.tuning_sentence(found, results.rows)}"
        parts.append(f"- **{cell(wording.title(task))}.** {cell(said)}")
    parts += [f"Made data: {cell(', '.join(made))}." for made in [made_data(results)] if made]
    parts += ["## Results", markdown(results).rstrip()]
    if results.budget:
        rows = [[cell(stage.stage), wording.duration(stage.seconds)] for stage in results.budget]
        parts += ["## Budget", grid(["Stage", "Time"], [*rows, ["In all", wording.duration(results.seconds)]])]
    parts += ["## Protocol", *_protocol_lists(results)]
    if results.notes:
        parts += ["## Notes", "\n".join(f"- {cell(note)}" for note in results.notes)]
    return "\n\n".join(parts) + "\n"


def _protocol_lists(results: Results) -> list[str]:
    facts = {
        "Made by": f"llmrec {results.llmrec}, {results.created}",
        "Command": results.command,
        "Recipe hash": results.recipe_hash,
        "Seed": str(results.seed),
    }
    for kind, data in results.data.items():
        if data:
            facts[f"Data ({kind})"] = (
                f"{data.name}: {data.users} users, {data.items} items, {data.interactions} interactions; "
                f"split {data.split}, {data.train}/{data.valid}/{data.test}; "
                f"fingerprint {data.fingerprint}, split {data.split_fingerprint}"
            )
    for kind, drawn in results.candidates.items():
        if drawn:
            facts[f"Candidates ({kind})"] = f"{drawn.count} a request, {drawn.kind}, digest {drawn.digest}"
    facts["Machine"] = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    facts["Versions"] = ", ".join(f"{key} {value}" for key, value in results.versions.items())
    lines = [f"- {cell(key)}: {cell(value)}" for key, value in facts.items()]
    lines += [
        f"- Signature, {cell(wording.title(task))}, {cell(', '.join(names))}: {cell(protocol)}"
        for task, entries in signatures(results).items()
        for protocol, names in entries.items()
    ]
    text = dump(results.recipe).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return ["\n".join(lines), f"{fence}yaml\n{wording.visible(text)}\n{fence}"]
