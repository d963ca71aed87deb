"""The leaderboard: committed suite results beside published figures, one protocol a table.

Both are files that others may have written: every text passes `escape.cell` or `escape.code` on its way into the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from llmrec.bench.glance import glance
from llmrec.bench.records import SuitePair, SuiteProtocol, SuiteResult, retested
from llmrec.bench.wording import drawn, explored_lines, fewer, planned_lines, planned_note, standing
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.recipe.pages import parsed
from llmrec.recipe.schema import settings
from llmrec.report.escape import cell, code, flat, without_surrogates
from llmrec.report.table import grid
from llmrec.report.wording import DASH, FORMS, KINDS, UNDEFINED, difference, history_worth, undefined_lines
from llmrec.resources import resource
from llmrec.results import Figure, Reads, lower

_HEAD = """# Leaderboard

Written by `llmrec eval SUITE` from `eval/results/` and `eval/references/`; do not edit. Rankings are of the whole
catalogue, with the exact expectation over ties. A table holds one protocol, and each section says how the parameters
of its rows came about.
Published figures are as printed by their source; nobody but the source vouches for them.
"""
_HEADINGS = {
    "rating": "Ratings",
    "yes-no": "Yes or no to an item",
    "excluded": "Seen items filtered",
    "included": "Seen items not filtered",
}
_LATER = "Thought of after the test split was seen, so that they are exploratory (95 %, no p and no verdict):"
_RULE = (
    "*Best row less this one*: the best row is picked on the very figures that it is compared by, so these differences "
    "are exploratory: unadjusted 95 % intervals, no p and no verdict."
)


# --------------------------------------------------------------------------- published figures


class Page(BaseModel):
    """Frozen base of the pages under eval/references."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Published(Page):
    """One published row. ``seen``: whether items of the history could be ranked, as far as the source tells."""

    system: str
    source: str
    seen: Literal["excluded", "included", "unknown", "rating", "yes-no"]
    values: Mapping[str, float]
    note: str = ""


class Protocol(Page):
    """What a reference's rows share."""

    split: str
    candidates: str


class Reference(Page):
    """One page of published figures on one data set."""

    reference: str
    data: str
    counts: Mapping[Literal["users", "items", "interactions"], int]
    protocol: Protocol
    rows: tuple[Published, ...]


def all_references() -> dict[str, Reference]:
    """Return every page of published figures by its name."""
    return {page.stem: load_reference(page) for page in sorted(resource("eval", "references").glob("*.yaml"))}


def load_reference(path: Path) -> Reference:
    """Read a page of published figures.

    Raises:
        DataError: If it cannot be read or does not have this form.
    """
    try:
        return Reference.model_validate(parsed(path.read_text(encoding="utf-8"), path)[0])
    except (OSError, RecipeError, ValueError) as error:
        raise DataError(
            f"{path}: not a page of published figures ({flat(str(error))}); see the other pages beside it",
            kind="wrong-format",
            at=path,
        ) from error


# --------------------------------------------------------------------------- our own


def read_results(folder: Path) -> list[SuiteResult]:
    """Return every suite result in a folder; other files there are left alone.

    Raises:
        DataError: If a file is not JSON, or a suite lacks something.
        LlmrecError: If the rows of one table were measured under different protocols.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file}: is not JSON ({error}); write it again with `llmrec eval`", kind="syntax", at=file
            ) from error
        if isinstance(content, dict) and content.get("kind") == "suite":
            found.append(suite_result(content))
    return found


def leaderboard(results: Sequence[SuiteResult], references: Mapping[str, Reference]) -> str:
    """Return the Markdown page.

    Args:
        results: From `read_results`.
        references: Published pages by name.
    """
    suites = sorted(results, key=lambda found: found.suite)
    pages = ([references[name] for name in found.references if name in references] for found in suites)
    head = [_HEAD, glance(suites), ""] if len(suites) > 1 else [_HEAD]
    return "\n".join([*head, *map(_section, suites, pages)])


def suite_result(content: Mapping[str, object]) -> SuiteResult:
    """Return what a suite wrote as checked records.

    Raises:
        DataError: If it lacks something.
        LlmrecError: If the rows of one table were measured under different protocols.
    """
    name = flat(str(content.get("suite")))
    try:
        found = SuiteResult.model_validate(without_surrogates(dict(content)))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise DataError(
            f"suite {name!r}: key {flat(place)!r}: {problem['msg']}; write it again with `llmrec eval`",
            kind="missing-key" if problem["type"] == "missing" else "bad-value",
            at=name,
            column=flat(place),
        ) from error
    for seen in found.protocol.seen:
        _one_protocol(found, seen)
    return found


def _one_protocol(found: SuiteResult, seen: str) -> None:
    """Refuse a table whose rows lack a metric or were measured under different protocols."""
    metrics = found.protocol.metrics
    if (
        not found.rows
        or not metrics
        or any(
            seen not in row.tables or any(name not in row.tables[seen].metrics for name in metrics)
            for row in found.rows
        )
    ):
        raise DataError(
            f"suite {found.suite!r}: a row of table {seen!r} lacks figures; write it again with `llmrec eval`",
            kind="missing-value",
            at=found.suite,
        )
    for name in metrics:
        signatures = {row.tables[seen].metrics[name].signature: row.name for row in found.rows}
        if len(signatures) > 1:
            (one, first), (two, second) = list(signatures.items())[:2]
            raise LlmrecError(
                f"suite {found.suite!r}: rows of table {seen!r} were measured under different protocols, {first!r} "
                f"({one}) and {second!r} ({two}), so they cannot share it; run the suite again",
                kind="mismatch",
                at=found.suite,
            )


# --------------------------------------------------------------------------- the page


def _section(found: SuiteResult, references: Sequence[Reference]) -> str:
    data, protocol = found.data, found.protocol
    counts = f"{data.users:,} users, {data.items:,} items, {data.interactions:,} interactions"
    where = f"{found.machine.get('cpu') or 'an unknown processor'}, {found.machine.get('cores') or 'unknown'} cores"
    lines = [
        f"## {cell(found.suite)}",
        "",
        f"{cell(found.description)} {counts}; split {cell(protocol.split)}, {protocol.users:,} evaluated users, "
        f"seeds {', '.join(map(str, protocol.seeds))}. {code(found.command)}, {found.seconds / 60:.0f} min on "
        f"{cell(where)}.",
    ]
    said = [*_chosen(found), standing(protocol.users, len(protocol.seeds)), fewer(found.rows)]
    lines += [part for line in said if line for part in ("", cell(line))]
    lines += ["", chance] if (chance := drawn(found.llmrec, [row.name for row in found.rows])) else []
    if found.skipped:
        lines += ["", _not_run(found)]
    tested = _tested(found)
    if many := sum(map(len, tested.values())):
        lines += ["", planned_note(many, earlier=any(pair.earlier for pairs in tested.values() for pair in pairs))]
    for seen in protocol.seen:
        heading = _HEADINGS.get(seen, f"Seen items {seen}")
        lines += ["", f"### {cell(heading)}", "", _ours(found, seen)]
        lines += ["", _RULE] if _less(found, seen) else []
        lines += [part for line in _undefined(found, seen) for part in ("", cell(line))]
        lines += ["", cell(found.detectable[seen])] if found.detectable.get(seen) else []
        lines += [part for line in (*_fusions(found, seen), *_cold(found, seen)) for part in ("", line)]
        empty = [pair for pair in found.pairs if pair.seen == seen and pair.n == 0]
        if tested[seen] or empty:
            lines += ["", "Planned comparisons:", "", *planned_lines([*tested[seen], *empty])]
        if explored := [pair for pair in found.explored if pair.seen == seen]:
            lines += ["", _LATER, "", *explored_lines(explored)]
        lines += _beside(found, references, seen, "Published under the same protocol", ":")
    lines += _beside(found, references, "unknown", "### Published, treatment of the history not stated", "")
    return "\n".join([*lines, ""])


def _not_run(found: SuiteResult) -> str:
    """Say which rows of the page were not run, and what that does to the planned comparisons."""
    many = f"{found.unrun} planned comparison{'' if found.unrun == 1 else 's'}"
    counted = f"; {many} with them count in the correction as if they had been tested" if found.unrun else ""
    return f"Not run: {', '.join(cell(name) for name in found.skipped)}{counted}."


def _beside(found: SuiteResult, references: Sequence[Reference], seen: str, heading: str, end: str) -> list[str]:
    """Show published rows of one treatment of the history; those on other interactions stand apart, page by page."""
    fitting = [page for page in references if _fits(page, found.protocol)]
    same = [row for page in fitting if _same_data(page, found) for row in page.rows if row.seen == seen]
    lines = ["", f"{heading}{end}", "", _published(same, found.protocol.metrics)] if same else []
    for page in fitting:
        rows = [row for row in page.rows if row.seen == seen]
        if rows and not _same_data(page, found):
            counts = ", ".join(f"{count:,} {cell(what)}" for what, count in page.counts.items())
            lines += ["", f"{heading}, but on other interactions ({cell(page.data)}: {counts}){end}"]
            lines += ["", _published(rows, found.protocol.metrics)]
    return lines


def _fusions(found: SuiteResult, seen: str) -> list[str]:
    """Show the weights of every fusion of a table, what each part contributes, and what the fusion costs."""
    rows, blocks = {row.name: row for row in found.rows}, []
    for row in found.rows:
        fusion = row.tables[seen].fusion
        if fusion is None:
            continue
        limits = "; 95 % over users" if any(part.low is not None for part in fusion.parts) else ""
        worth = f" {said}" if (said := history_worth(fusion.repeat)) else ""
        spent = sum(sum(rows[part.name].seconds.values()) for part in fusion.parts if part.name in rows)
        blocks.append(
            f"Weights of {cell(row.name)} ({FORMS[fusion.form]}{limits}).{worth} Its parts took {spent:.0f} s "
            f"with their tuning and seeds, the fusion itself {sum(row.seconds.values()):.0f} s."
        )
        if fusion.form == "alone":
            blocks[-1] += f" It is {cell(next(part.name for part in fusion.parts if part.weight))}."
            continue
        table = [
            [
                cell(part.name),
                _limited(part.weight, part.low, part.high, 2),
                _limited(part.loss, part.loss_low, part.loss_high, 4),
            ]
            for part in sorted(fusion.parts, key=lambda part: -(part.loss or 0.0))
        ]
        blocks.append(_left(["part", "weight", "lost without it, on validation"], table))
    return blocks


def _limited(value: float | None, low: float | None, high: float | None, digits: int) -> str:
    if value is None:
        return DASH
    shown = f"{value:.{digits}f}"
    return shown if low is None or high is None else f"{shown} [{low:.{digits}f}, {high:.{digits}f}]"


def _chosen(found: SuiteResult) -> list[str]:
    """Say how the parameters of a suite's rows came about."""
    seen = found.protocol.seen
    tuned = [row for row in found.rows if row.trials]
    lines = []
    if any(row.tables[seen[0]].parameters is None for row in tuned):
        most = max(len(row.trials) for row in tuned)
        both = f" and by the figures of the table {seen[0]} alone, for all tables" if len(seen) > 1 else ""
        lines.append(
            f"An earlier version chose the parameters on validation, among at most {most} points a row{both}. It did "
            "not note which values stand at an end of their grid."
        )
    elif tuned:
        lines.append("Parameters are chosen on validation, for each table by itself.")
    given = [
        row.name
        for row in found.rows
        if row.baseline and not row.trials and set(row.parameters_of(seen[0])) - {"liked"}
    ]
    if given:
        lines.append(f"Not tuned in this suite, which names their parameters: {', '.join(given)}.")
    return lines


def _tested(found: SuiteResult) -> dict[str, list[SuitePair]]:
    """Return the planned comparisons of each table, tested as one family over the file."""
    asked = [pair for pair in found.pairs if None not in (pair.value, pair.low, pair.high, pair.p)]
    tables = [[pair for pair in asked if pair.seen == seen] for seen in found.protocol.seen]
    return dict(zip(found.protocol.seen, retested(tables), strict=True))


def _cold(found: SuiteResult, seen: str) -> list[str]:
    """Show rows that find items without training interactions, and their figures on all other requests."""
    metrics, rows = found.protocol.metrics, []
    last = metrics[-1]
    # Results of before there were such figures have none.
    shown = [name for name in found.rows[0].tables[seen].metrics if name.startswith(("Exposure@", "ColdItems@"))]
    for row in found.rows:
        table = row.tables[seen]
        cold, whole = table.cold or {}, table.metrics[last].value
        few = cold.get("n", 0.0)
        if not cold.get(last) or whole is None or few >= table.n:
            continue
        rest = (whole * table.n - cold[last] * few) / (table.n - few)
        rows.append((cold[last], [cell(row.name), *(f"{cold[name]:.4f}" for name in metrics), f"{rest:.4f}"]))
        rows[-1][1].extend(f"{table.metrics[name].value or 0:.4g}" for name in shown if name in table.metrics)
    if not rows:
        return []
    few = max((row.tables[seen].cold or {}).get("n", 0.0) for row in found.rows)
    said = f"Targets without training interactions, {few:.0f} requests; a row that is missing here finds none of them:"
    ordered = [cells for _, cells in sorted(rows, key=lambda each: -each[0])]
    return [said, _left(["predictor", *metrics, f"{last} on all other requests", *shown], ordered)]


def _undefined(found: SuiteResult, seen: str) -> list[str]:
    """Say which figures of a table are not defined, of which rows and why."""
    names = found.protocol.metrics
    figures = [(row.name, name, row.tables[seen].metrics[name]) for row in found.rows for name in names]
    missing = [(row, name, figure.undefined) for row, name, figure in figures if figure.value is None]
    return undefined_lines(missing, len(found.rows), names[-1])


def _fits(page: Reference, protocol: SuiteProtocol) -> bool:
    # A suite without candidates has one table, and its references name that.
    kind = protocol.candidates or protocol.seen[0]
    return page.protocol.candidates == kind and page.protocol.split in protocol.split


def _same_data(page: Reference, found: SuiteResult) -> bool:
    """Whether a page counts as many users, items and interactions as the suite read."""
    return all(getattr(found.data, what) == count for what, count in page.counts.items())


def _ours(found: SuiteResult, seen: str) -> str:
    *others, last = found.protocol.metrics
    rows = sorted(found.rows, key=lambda row: _place(row.tables[seen].metrics[last].value, last))
    best = {name: _best([row.tables[seen].metrics[name].value for row in rows], name) for name in (*others, last)}
    ranged = any(row.tables[seen].metrics[last].range for row in rows)
    less = _less(found, seen)
    header = ["predictor", *others, last, *(["over tie rules"] if ranged else [])]
    header += ["best row less this one"] if less else []
    table: list[list[str]] = []
    kinds = [kind for kind in get_args(Reads) if any(row.reads == kind for row in rows)]
    if len(kinds) > 1:
        rows.sort(key=lambda row: kinds.index(row.reads or kinds[0]))
    for place, row in enumerate(rows):
        if len(kinds) > 1 and row.reads and (place == 0 or row.reads != rows[place - 1].reads):
            table.append([f"*{KINDS[row.reads]}*", *[""] * (len(header) + 3)])
        figures = row.tables[seen].metrics
        cells = [_bold(figures[name].value, best[name]) for name in others]
        cells.append(f"{_bold(figures[last].value, best[last])}{_spread(figures[last])}")
        cells += [_range(figures[last])] if ranged else []
        cells += [less.get(row.name, DASH)] if less else []
        border = row.tables[seen].border
        chosen = ", ".join(
            f"{name} {value}{' (end of its grid)' if name in border else ''}"
            for name, value in settings(row.parameters_of(seen))
            # Of a part alone it says which; the other forms are of all.
            if name != "of" or value != row.parameters_of(seen).get("form")
        )
        ties = DASH if row.tables[seen].tie_rate is None else f"{row.tables[seen].tie_rate:.1%}"
        memory = DASH if row.memory_gb is None else f"{row.memory_gb:.1f}"
        table.append([cell(row.name), *cells, ties, cell(chosen or "none"), f"{sum(row.seconds.values()):.0f}", memory])
    return _left([*header, "ties", "parameters", "seconds", "GB"], table)


def _less(found: SuiteResult, seen: str) -> dict[str, str]:
    """Return, by row name, the best row's figure less the row's; nothing where two rows have one name."""
    names = [row.name for row in found.rows]
    if len(set(names)) < len(names):
        return {}
    return {
        entry.b: difference(entry.value, entry.low, entry.high, 4) for entry in found.comparisons if entry.seen == seen
    }


def _place(value: float | None, metric: str) -> tuple[bool, float]:
    """Return the sort key of a figure: best first, none last."""
    return (True, 0.0) if value is None else (False, value if lower(metric) else -value)


def _best(values: Sequence[float | None], metric: str) -> float | None:
    return min(values, key=lambda value: _place(value, metric))


def _bold(value: float | None, best: float | None) -> str:
    return UNDEFINED if value is None else f"**{value:.4f}**" if value == best else f"{value:.4f}"


def _spread(figure: Figure) -> str:
    bounds = "" if figure.low is None or figure.high is None else f" [{figure.low:.4f}, {figure.high:.4f}]"
    return bounds + ("" if figure.sd is None else f" sd {figure.sd:.4f}")


def _range(figure: Figure) -> str:
    return DASH if figure.range is None else "{:.4f} to {:.4f}".format(*figure.range)


def _published(rows: Sequence[Published], metrics: Sequence[str]) -> str:
    """Return published rows, best first by the last metric that they print."""

    def key(row: Published) -> tuple[int, bool, float]:
        place = next((place for place, name in enumerate(reversed(metrics)) if name in row.values), len(metrics))
        name = metrics[-1 - place] if place < len(metrics) else metrics[-1]
        return (place, *_place(row.values.get(name), name))

    table = [
        [
            cell(row.system),
            *(f"{row.values[name]:.4f}" if name in row.values else "" for name in metrics),
            cell(row.source),
            cell(row.note),
        ]
        for row in sorted(rows, key=key)
    ]
    return _left(["system", *metrics, "source", "note"], table)


def _left(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return grid([cell(name) for name in header], rows, numeric_from=len(header))
