"""Writes one page per benchmark; `llmrec.bench.leaderboard` writes the page over all data sets.

Results are untrusted files: the template escapes every text except `Markup`, whose parts have passed `escape_cell` or
`code_span`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup
from pydantic import ValidationError

from llmrec.bench.records import (
    BenchmarkPair,
    BenchmarkResult,
    BenchmarkRow,
    BenchmarkTable,
    PairSlice,
    RowFigures,
    sort_key,
)
from llmrec.bench.references import PublishedResult, Reference
from llmrec.chat.opening import MANAGERS
from llmrec.display import single_line
from llmrec.errors import DataError, LlmrecError
from llmrec.recipe.schema import flat_parameters
from llmrec.report.breakdowns import slice_title
from llmrec.report.escape import code_span, escape_cell, without_surrogates
from llmrec.report.render import markdown_environment
from llmrec.report.table import markdown_table
from llmrec.report.wording import (
    DASH,
    ENSEMBLE_FORMS,
    INPUT_KINDS,
    SEEDS,
    UNDEFINED,
    USERS,
    describe_history_weight,
    difference,
    format_confidence_level,
    format_p_value,
    format_verdict,
    title,
    undefined_lines,
)
from llmrec.results import Figure, Reads

_HEADINGS = {
    "rating": "Ratings",
    "yes-no": "Like prediction",
    "excluded": "Seen items filtered",
    "included": "Seen items not filtered",
}
_SEEN_ITEM_WORDS = {"excluded": "seen items filtered", "included": "seen items not filtered"}
# Number of features of a learned ensemble to list.
_MAX_FEATURES = 12


# --------------------------------------------------------------------------- reading and writing


def read_benchmark_results(folder: Path) -> list[BenchmarkResult]:
    """Return all benchmark results in a folder; other files are ignored.

    Raises:
        DataError: If a file is not JSON or a result is incomplete.
        LlmrecError: If the rows of one table were measured under different protocols.
    """
    results = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file} is not JSON ({error}); write it again with `llmrec eval`", kind="syntax", at=file
            ) from error
        if isinstance(content, dict) and content.get("kind") in ("suite", "benchmark", "chat"):
            result = parse_benchmark_result({"benchmark": file.stem, **content})
            if result.benchmark != file.stem:
                raise DataError(
                    f"{file}: contains the result of {single_line(result.benchmark)!r}, which is not the name of the "
                    "file; rename the file, or write it again with `llmrec eval`",
                    kind="mismatch",
                    at=file,
                )
            results.append(result)
    return results


def parse_benchmark_result(content: Mapping[str, object]) -> BenchmarkResult:
    """Validate the content of a benchmark result.

    Raises:
        DataError: If it is incomplete.
        LlmrecError: If the rows of one table were measured under different protocols.
    """
    name = single_line(str(content.get("benchmark")))
    for key in () if content.get("kind") == "benchmark" else ("data", "protocol"):
        if content.get(key) is None:
            raise DataError(
                f"benchmark {name!r}: the key {key} is missing; write the result again with `llmrec eval`",
                kind="missing-key",
                at=name,
                column=key,
            )
    try:
        result = BenchmarkResult.model_validate(without_surrogates(dict(content)))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        key = single_line(".".join(map(str, problem["loc"])))
        raise DataError(
            f"benchmark {name!r}: key {key!r}: {problem['msg']}; write the result again with `llmrec eval`",
            kind="missing-key" if problem["type"] == "missing" else "bad-value",
            at=name,
            column=key,
        ) from error
    for table in result.tables:
        _check_table(result, table)
    return result


def _check_table(result: BenchmarkResult, table: BenchmarkTable) -> None:
    """Reject a table whose models lack its metric or were measured under different protocols."""
    rows = [(row, row.tables[table.name]) for row in result.rows if table.name in row.tables]
    # Models of recipes may have additional metrics.
    names = table.metrics if result.kind == "suite" else (table.metric,)
    complete = result.kind == "benchmark" or len(rows) == len(result.rows)
    if not rows or not complete or any(name not in figures.metrics for _, figures in rows for name in names):
        raise DataError(
            f"benchmark {result.benchmark!r}: a model in table {table.name!r} lacks metrics; write the result again "
            "with `llmrec eval`",
            kind="missing-value",
            at=result.benchmark,
        )
    for name in names:
        signatures = {figures.metrics[name].signature: row.name for row, figures in rows}
        if len(signatures) > 1:
            (one, first), (two, second) = list(signatures.items())[:2]
            raise LlmrecError(
                f"benchmark {result.benchmark!r}: models in table {table.name!r} were measured under different "
                f"protocols, {first!r} ({one}) and {second!r} ({two}), so they are not comparable; run the benchmark "
                "again",
                kind="mismatch",
                at=result.benchmark,
            )


def benchmark_pages(result: BenchmarkResult, references: Mapping[str, Reference]) -> dict[str, str]:
    """Return the page of a benchmark by file name.

    Args:
        result: From `read_benchmark_results`.
        references: Pages of published figures by name.
    """
    view = _template_variables(result, _named_references(result, references))
    return {f"{result.benchmark}.md": benchmark_environment().get_template("benchmark.md.j2").render(view=view)}


@functools.cache
def benchmark_environment() -> ImmutableSandboxedEnvironment:
    """Return the template engine of the pages."""
    result = markdown_environment(Path(__file__).resolve().parent)
    result.globals.update(exploratory=_exploratory_note, compared=_comparison_line, managers=MANAGERS, least=SEEDS)
    return result


# --------------------------------------------------------------------------- page of a benchmark


def _template_variables(result: BenchmarkResult, references: Sequence[Reference]) -> dict[str, Any]:
    """Return the template variables of a benchmark."""
    tuned = [row for row in result.rows if row.arm == "tuned"]
    return {
        "result": result,
        "tables": [
            {
                "table": table,
                "heading": _table_heading(result, table),
                "seeds": min((row.seeds for row in tuned if table.name in row.tables), default=SEEDS),
                "grid": Markup(_result_table(result, table)),
                "less": bool(_differences_by_model(result, table)),
                "undefined": _describe_undefined(result, table),
                "blocks": [*_ensemble_blocks(result, table), *_cold_item_blocks(result, table)],
                "planned": [pair for pair in result.pairs if pair.table == table.name],
                "opponents": _opponent_notes(result, table),
                "explored": [pair for pair in result.explored if pair.table == table.name],
                "published": _published_blocks(
                    result, references, table.name, "Published under the same protocol", ":"
                ),
            }
            for table in result.tables
        ],
        "chosen": _tuning_sentences(result) if result.kind == "suite" else [],
        "fewer": [row for row in result.rows if row.fewer_seeds and row.seeds < SEEDS],
        "tested": [pair for pair in result.pairs if pair.p is not None],
        "ensembles": any(figures.members for row in result.rows for figures in row.tables.values()),
        "slices": _slice_tables(result),
        "unknown": _published_blocks(
            result, references, "unknown", "## Published, without a statement on seen items", ""
        ),
    }


def _table_heading(result: BenchmarkResult, table: BenchmarkTable) -> str:
    if result.kind == "suite":
        return _HEADINGS.get(table.name, f"Seen items {table.name}")
    return "" if result.kind == "chat" else f"{title(table.task)}: {table.metric}"


def _exploratory_note(users: int, seeds: int) -> str:
    """Return a note if a table is exploratory because it has too few users or seeds; otherwise empty.

    Args:
        users: Number of users of the table.
        seeds: Number of seeds of its stochastic rows.
    """
    few = [f"{users:,} users, fewer than {USERS}"] if users < USERS else []
    few += [f"{seeds} training {'seed' if seeds == 1 else 'seeds'}, fewer than {SEEDS}"] if seeds < SEEDS else []
    if not few:
        return ""
    return f"Exploratory ({'; '.join(few)}): results and verdicts are preliminary."


def _tuning_sentences(result: BenchmarkResult) -> list[str]:
    """Return a sentence on how hyperparameters were selected."""
    names = [table.name for table in result.tables]
    tuned = [row for row in result.rows if len(row.trials) > 1]
    lines = []
    # Ensembles have separate trials for each table.
    if tuned and all(
        any(trial.values.get(name) is not None for trial in row.trials) for row in tuned for name in names
    ):
        lines.append("Hyperparameters are chosen on validation users, separately for each table.")
    fixed = [
        row.name
        for row in result.rows
        if row.baseline and row not in tuned and set(row.tables[names[0]].parameters) - {"liked"}
    ]
    if fixed:
        lines.append(f"The hyperparameters of these models are fixed and not tuned: {', '.join(fixed)}.")
    return lines


def _opponent_notes(result: BenchmarkResult, table: BenchmarkTable) -> list[Markup]:
    """Return a line for each planned comparison of an ensemble with a single model that validation does not prefer."""
    rows = {row.name: row for row in result.rows if table.name in row.tables}
    lines = list[Markup]()
    for pair in result.pairs:
        if pair.table != table.name or pair.items is not None:
            continue
        ensemble, single = (rows[name].tables[table.name].fusion is not None for name in (pair.a, pair.b))
        best = result.best_on_validation(table, rows[pair.a].reads)
        if ensemble and not single and best and pair.b not in best:
            names = ", ".join(code_span(name) for name in sorted(best))
            lines.append(
                Markup(
                    f"{code_span(pair.a)} is compared with {code_span(pair.b)}, which is not the best model on "
                    f"validation; that is {names}."
                )
            )
    return lines


# --------------------------------------------------------------------------- result table

Column = tuple[str, Callable[[BenchmarkRow, RowFigures], str]]


def _result_table(result: BenchmarkResult, table: BenchmarkTable) -> str:
    """Return the models of a table, best first, grouped by type if there are several types."""
    rows, columns = result.standings(table), _table_columns(result, table)
    kinds = [kind for kind in get_args(Reads) if any(row.reads == kind for row, _ in rows)]
    if len(kinds) > 1:
        rows.sort(key=lambda entry: kinds.index(entry[0].reads or kinds[0]))
    lines: list[list[str]] = []
    for number, (row, figures) in enumerate(rows):
        if len(kinds) > 1 and row.reads and (number == 0 or row.reads != rows[number - 1][0].reads):
            lines.append([f"*{INPUT_KINDS[row.reads]}*", *[""] * (len(columns) - 1)])
        lines.append([write(row, figures) for _, write in columns])
    header = [head for head, _ in columns]
    # parameters are the only text among the columns
    numbers = header.index("parameters") if "parameters" in header else len(header)
    return markdown_table([escape_cell(name) for name in header], lines, numeric_to=numbers)


def _table_columns(result: BenchmarkResult, table: BenchmarkTable) -> list[Column]:
    """Return the columns of a table that are not empty."""
    entries = result.standings(table)
    rows, figures = [row for row, _ in entries], [entry for _, entry in entries]
    columns: list[Column] = [("model", _model_cell)]
    for name in table.metrics:
        values = [entry.metrics[name].value for entry in figures if name in entry.metrics]
        best = min(values, key=functools.partial(sort_key, metric=name), default=None)
        columns.append((name, functools.partial(_metric_cell, name, best, headline=name == table.metric)))
    if any(entry.metrics[table.metric].range for entry in figures):
        columns.append(("over tie rules", lambda _, entry: _range_cell(entry.metrics[table.metric])))
    if less := _differences_by_model(result, table):
        head = "best model − this one" if result.kind == "suite" else "− best baseline"
        columns.append((head, lambda row, _: less.get(row.name, DASH)))
    if any(entry.tie_rate is not None for entry in figures):
        columns.append(("ties", lambda _, entry: DASH if entry.tie_rate is None else f"{entry.tie_rate:.1%}"))
    if any(entry.parameters for entry in figures):
        columns.append(("parameters", lambda _, entry: _parameters_cell(entry)))
    if any(entry.tokens_per_request for entry in figures):
        columns += [
            ("tokens", lambda row, entry: _cost_cell(entries, row, entry, "tokens_per_request", ",.0f")),
            ("calls", lambda row, entry: _cost_cell(entries, row, entry, "forwards_per_request", ",.1f")),
        ]
    if any(entry.seconds_per_request for entry in figures):
        columns.append(("seconds", lambda row, entry: _cost_cell(entries, row, entry, "seconds_per_request", ".3f")))
    if any(row.seconds for row in rows):
        columns.append(("seconds", lambda row, _: f"{sum(row.seconds.values()):.0f}"))
    if any(row.memory_gb is not None for row in rows):
        columns.append(("GB", lambda row, _: DASH if row.memory_gb is None else f"{row.memory_gb:.1f}"))
    if any(row.dialogues for row in rows):
        columns += [
            (head, functools.partial(_dialogue_cell, name, form))
            for head, name, form in (
                ("turns", "turns", ".1f"),
                ("seconds per turn", "seconds_a_turn", ".3f"),
                ("tokens per turn", "tokens_a_turn", ",.0f"),
            )
        ]
        columns += [
            ("parsed calls", lambda _, entry: f"{entry.parse_rate:.3f}"),
            ("users", functools.partial(_dialogue_cell, "users", ",")),
        ]
    return columns


def _model_cell(row: BenchmarkRow, _: RowFigures) -> str:
    knows = f" (users know {', '.join(row.dialogues.knows)})" if row.dialogues and row.dialogues.knows else ""
    return escape_cell(row.name + knows) + (" (baseline)" if row.arm == "baseline" else "")


def _metric_cell(name: str, best: float | None, _: BenchmarkRow, figures: RowFigures, *, headline: bool) -> str:
    figure = figures.metrics.get(name)
    if figure is None:
        return DASH
    value = figure.value
    text = UNDEFINED if value is None else f"**{value:.4f}**" if value == best else f"{value:.4f}"
    if not headline:
        return text
    bounds = "" if figure.low is None or figure.high is None else f" [{figure.low:.4f}, {figure.high:.4f}]"
    return text + bounds + ("" if figure.sd is None else f" sd {figure.sd:.4f}")


def _range_cell(figure: Figure) -> str:
    return DASH if figure.range is None else "{:.4f} to {:.4f}".format(*figure.range)


def _differences_by_model(result: BenchmarkResult, table: BenchmarkTable) -> dict[str, str]:
    """Return the difference best − model or, for language models, model − best baseline.

    Empty if two rows have the same name.
    """
    names = [row.name for row in result.rows]
    if len(set(names)) < len(names):
        return {}
    pairs = [pair for pair in result.comparisons if pair.table == table.name]
    if result.kind == "benchmark":
        pairs += [pair for pair in result.pairs if pair.table == table.name and pair.b == table.best_baseline]
    return {
        pair.a if result.kind == "benchmark" else pair.b: difference(pair.value, pair.low, pair.high, 4)
        for pair in pairs
    }


def _parameters_cell(figures: RowFigures) -> str:
    chosen = ", ".join(
        f"{name} {value}{' (end of its grid)' if name in figures.border else ''}"
        for name, value in flat_parameters(figures.parameters)
        # The form names the only member that the ensemble uses; other forms use all members.
        if name != "of" or value != figures.parameters.get("form")
    )
    return escape_cell(chosen or "none")


def _cost_cell(
    entries: Sequence[tuple[BenchmarkRow, RowFigures]], row: BenchmarkRow, figures: RowFigures, name: str, form: str
) -> str:
    """Return the inference cost per request, including the members of an ensemble."""
    if row.arm == "baseline" and name != "seconds_per_request":
        return DASH
    members = [entry for row, entry in entries if row.name in figures.members]
    return f"{float(sum(getattr(entry, name) for entry in (figures, *members))):{form}}"


def _dialogue_cell(name: str, form: str, row: BenchmarkRow, _: RowFigures) -> str:
    value = getattr(row.dialogues, name)
    return f"{value:{form}}" if value else DASH


def _describe_undefined(result: BenchmarkResult, table: BenchmarkTable) -> list[str]:
    """Return sentences on the undefined values of a table, with models and reasons."""
    rows = result.standings(table)
    figures = [
        (row.name, name, entry.metrics[name]) for row, entry in rows for name in table.metrics if name in entry.metrics
    ]
    missing = [(row, name, figure.undefined) for row, name, figure in figures if figure.value is None]
    return undefined_lines(missing, len(rows), table.metric)


def _ensemble_blocks(result: BenchmarkResult, table: BenchmarkTable) -> list[str]:
    """Return the weights, member contributions and costs of the ensembles in a table."""
    rows, blocks = {row.name: row for row in result.rows}, list[str]()
    for row in result.rows:
        fusion = row.tables[table.name].fusion if table.name in row.tables else None
        if fusion is None:
            continue
        limits = "; 95 % intervals over users" if any(part.low is not None for part in fusion.parts) else ""
        history_note = f" {note}" if (note := describe_history_weight(fusion.repeat)) else ""
        spent = sum(sum(rows[part.name].seconds.values()) for part in fusion.parts if part.name in rows)
        single = next((part.name for part in fusion.parts if part.weight), "")
        alone = f"{escape_cell(row.name)} uses a single member, {escape_cell(single)}."
        several = f"The table shows the weights of {escape_cell(row.name)} ({ENSEMBLE_FORMS[fusion.form]}{limits})."
        start = alone if fusion.form == "alone" else several
        block = (
            f"{start}{history_note} Fitting the members took {spent:.0f} s with tuning and all seeds, and fitting the "
            f"ensemble took {sum(row.seconds.values()):.0f} s."
        )
        if fusion.form == "alone":
            blocks.append(block)
            continue
        lines = [
            [
                escape_cell(part.name),
                _format_with_limits(part.weight, part.low, part.high, 2),
                _format_with_limits(part.loss, part.loss_low, part.loss_high, 4),
            ]
            for part in sorted(fusion.parts, key=lambda part: -(part.loss or 0.0))
        ]
        blocks += [block, _left_aligned_table(["member", "weight", "ablation, on validation"], lines)]
        if fusion.features:
            shares = [
                [escape_cell(feature.name), f"{feature.gain or 0.0:.3f}"] for feature in fusion.features[:_MAX_FEATURES]
            ]
            note = "These features of the ensemble have the largest share of the gain:"
            blocks += [note, _left_aligned_table(["feature", "share"], shares)]
    return [Markup(block) for block in blocks]


def _format_with_limits(value: float | None, low: float | None, high: float | None, digits: int) -> str:
    if value is None:
        return DASH
    shown = f"{value:.{digits}f}"
    return shown if low is None or high is None else f"{shown} [{low:.{digits}f}, {high:.{digits}f}]"


def _cold_item_blocks(result: BenchmarkResult, table: BenchmarkTable) -> list[str]:
    """Return sentences on the models that recommend cold-start items."""
    metrics, rows = table.metrics, list[tuple[float, list[str]]]()
    entries = result.standings(table)
    shown = [name for name in entries[0][1].metrics if name.startswith(("Exposure@", "ColdItems@"))]
    for row, figures in entries:
        cold, overall = figures.cold or {}, figures.value(table.metric)
        few = cold.get("n", 0.0)
        if not cold.get(table.metric) or overall is None or few >= figures.n:
            continue
        rest = (overall * figures.n - cold[table.metric] * few) / (figures.n - few)
        cells = [escape_cell(row.name), *(f"{cold[name]:.4f}" for name in metrics), f"{rest:.4f}"]
        cells += [f"{figures.metrics[name].value or 0:.4g}" for name in shown if name in figures.metrics]
        rows.append((cold[table.metric], cells))
    if not rows:
        return []
    few = max((figures.cold or {}).get("n", 0.0) for _, figures in entries)
    note = (
        f"The table shows {few:,.0f} requests for items without training interactions. Models that are not listed find "
        "none of these items:"
    )
    ordered = [cells for _, cells in sorted(rows, key=lambda entry: -entry[0])]
    head = ["model", *metrics, f"{table.metric} on all other requests", *shown]
    return [note, Markup(_left_aligned_table(head, ordered))]


def _left_aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table([escape_cell(name) for name in header], rows, numeric_from=len(header))


# --------------------------------------------------------------------------- comparisons


def _comparison_line(pair: BenchmarkPair) -> str:
    """Format a comparison as one line."""
    ends = f"{escape_cell(pair.metric)}{_describe_requests(pair)}: {escape_cell(pair.a)} − {escape_cell(pair.b)}"
    if pair.n == 0:
        return Markup(f"{ends}: no such requests")
    result = difference(pair.value, pair.low, pair.high, 4)
    if pair.verdict is None:
        return Markup(f"{ends}: {result}")
    return Markup(
        f"{ends}: {result} ({format_confidence_level(pair.level)}), p {escape_cell(format_p_value(pair.p))}, "
        f"{format_verdict(pair.verdict)}"
    )


def _describe_requests(pair: BenchmarkPair) -> str:
    """Describe on which requests a comparison was made; empty for all requests."""
    if pair.users is not None:
        return f", {pair.users:,} users{', exploratory' if pair.users < USERS else ''}"
    if pair.items is None:
        return ""
    if pair.items == "warm":
        return f", the {pair.n or 0:,} requests for items with training interactions"
    few = ", exploratory" if 0 < (pair.n or 0) < USERS else ""
    items = f", {pair.clusters:,} items, clustered by item" if pair.clusters else ""
    return f", the {pair.n or 0:,} requests for items without training interactions{items}{few}"


# --------------------------------------------------------------------------- published results


def _published_blocks(
    result: BenchmarkResult, references: Sequence[Reference], seen: str, heading: str, end: str
) -> list[str]:
    """Return tables of published results with a given treatment of items in the history, ``seen``."""
    metrics = result.tables[0].metrics
    fitting = [page for page in references if _has_same_protocol(page, result)]
    same = _matching_published(result, references, seen)
    blocks = [f"{heading}{end}", _published_table(same, metrics)] if same else []
    for page in fitting:
        rows = [row for row in page.rows if row.seen == seen]
        if rows and not _has_same_data(page, result):
            counts = ", ".join(f"{count:,} {escape_cell(what)}" for what, count in page.counts.items())
            blocks += [f"{heading}, on a different set of interactions ({escape_cell(page.data)}: {counts}){end}"]
            blocks += [_published_table(rows, metrics)]
    return [Markup(block) for block in blocks]


def _has_same_protocol(page: Reference, result: BenchmarkResult) -> bool:
    # A benchmark without candidates has one table, which its references name.
    protocol = result.protocol
    if protocol is None:
        return False
    kind = protocol.candidates or result.tables[0].name
    return page.protocol.candidates == kind and page.protocol.split in protocol.split


def _has_same_data(page: Reference, result: BenchmarkResult) -> bool:
    """Whether a publication reports the same numbers of users, items and interactions as the benchmark."""
    return all(getattr(result.data, what) == count for what, count in page.counts.items())


def published_results(result: BenchmarkResult, references: Mapping[str, Reference], seen: str) -> list[PublishedResult]:
    """Return the published results on the same data, protocol and treatment of history items."""
    return _matching_published(result, _named_references(result, references), seen)


def _named_references(result: BenchmarkResult, references: Mapping[str, Reference]) -> list[Reference]:
    """Return the references that a benchmark names, if they exist."""
    return [references[name] for name in result.references if name in references]


def _matching_published(result: BenchmarkResult, references: Sequence[Reference], seen: str) -> list[PublishedResult]:
    fitting = [page for page in references if _has_same_protocol(page, result) and _has_same_data(page, result)]
    return [row for page in fitting for row in page.rows if row.seen == seen]


def _published_table(rows: Sequence[PublishedResult], metrics: Sequence[str]) -> str:
    """Return published results, best first by the last metric."""

    def key(row: PublishedResult) -> tuple[int, bool, float]:
        last = next((number for number, name in enumerate(reversed(metrics)) if name in row.values), len(metrics))
        name = metrics[-1 - last] if last < len(metrics) else metrics[-1]
        return (last, *sort_key(row.values.get(name), name))

    lines = [
        [
            escape_cell(row.system),
            *(f"{row.values[name]:.4f}" if name in row.values else "" for name in metrics),
            escape_cell(row.source),
            escape_cell(row.note),
        ]
        for row in sorted(rows, key=key)
    ]
    return _left_aligned_table(["system", *metrics, "source", "note"], lines)


# --------------------------------------------------------------------------- subsets


def _slice_tables(result: BenchmarkResult) -> dict[str, str]:
    """Return tables of planned comparisons on subsets, by title."""
    reads = {row.name: row.reads for row in result.rows}
    order = get_args(Reads)
    kinds: dict[tuple[str, str], list[BenchmarkPair]] = {}
    for pair in result.pairs:
        one, other = reads.get(pair.a), reads.get(pair.b)
        if pair.slices and one is not None and other is not None and order.index(one) > order.index(other):
            kinds.setdefault((pair.a, pair.b), []).append(pair)
    return {
        Markup(
            f"{escape_cell(a)} ({INPUT_KINDS[reads[a]]}) − {escape_cell(b)} ({INPUT_KINDS[reads[b]]}), "
            f"{escape_cell(pairs[0].metric)}:"
        ): Markup(_slice_table(pairs))
        for (a, b), pairs in kinds.items()
    }


def _slice_table(pairs: Sequence[BenchmarkPair]) -> str:
    header = ["requests", "n", "items", *(escape_cell(_SEEN_ITEM_WORDS.get(pair.table, pair.table)) for pair in pairs)]
    names = dict.fromkeys((part.name, part.n, part.clusters) for pair in pairs for part in pair.slices)
    rows = [["all", "", "", *map(_slice_cell, pairs)]]
    for name, n, items in names:
        parts = [next((part for part in pair.slices if part.name == name), None) for pair in pairs]
        size = f"{items:,}" if items else ""
        rows.append(
            [
                escape_cell(slice_title(name)),
                f"{n:,}",
                size,
                *(DASH if part is None else _slice_cell(part) for part in parts),
            ]
        )
    return markdown_table(header, rows, numeric_from=1)


def _slice_cell(result: BenchmarkPair | PairSlice) -> str:
    if result.value is None or result.low is None or result.high is None:
        return DASH
    text = difference(result.value, result.low, result.high, 4)
    return f"**{text}**" if result.low > 0 or result.high < 0 else text
