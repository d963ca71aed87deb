"""The leaderboard: models by data sets, from the results named in ``eval/leaderboard.yaml``.

Results are untrusted files: the template escapes every text except `Markup`, whose parts have passed `escape.cell`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from pydantic import Field, ValidationError

from llmrec.bench.pages import benchmark_environment, benchmark_pages, published_results, read_benchmark_results
from llmrec.bench.records import BenchmarkResult, BenchmarkRow, BenchmarkTable, sort_key
from llmrec.bench.references import FrozenRecord, PublishedResult, Reference, read_references
from llmrec.display import single_line
from llmrec.durable import write_text
from llmrec.errors import DataError, RecipeError
from llmrec.recipe.pages import parse_yaml
from llmrec.registry import is_lower_better
from llmrec.report.escape import escape_cell
from llmrec.report.table import markdown_table
from llmrec.report.wording import DASH

PAGE, DATA, SETTINGS = "LEADERBOARD.md", "leaderboard.json", "leaderboard.yaml"

ModelType = Literal["control", "interactions", "text", "fine-tuned text encoder", "language model", "ensemble"]

# Shorter training times in seconds are not shown exactly.
_MIN_EXACT_SECONDS = 1.0

# Number of published systems below each table; the pages of the data sets show all of them.
_MAX_PUBLISHED = 4


class Column(FrozenRecord):
    """A data set of the leaderboard.

    Attributes:
        suite: The suite with its results.
        title: Its name on the leaderboard.
        table: The table of the suite; empty for its first.
        further: Models of further suites with the same requests, by suite; they replace those of the same name. A suite
            is left out if its results differ in data or protocol.
    """

    suite: str
    title: str
    table: str = ""
    further: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)


class Group(FrozenRecord):
    """Data sets with the same models and metric."""

    title: str
    columns: tuple[Column, ...]


class Model(FrozenRecord):
    """The description of a model on the leaderboard.

    Attributes:
        title: Its name on the leaderboard.
        pretrained: Its pretrained network and the number of its weights; empty without one.
        type: Its type; empty if its results tell.
    """

    title: str
    pretrained: str = ""
    type: ModelType | Literal[""] = ""


class LeaderboardConfig(FrozenRecord):
    """Settings of the leaderboard.

    Attributes:
        groups: The tables.
        models: Descriptions by the rows' names; rows without one are left out, and `undescribed_models` names them.
        left_out: Rows of the suites that are controls of their pages and no models of the leaderboard, and published
            systems that are none.
        featured: Rows of the short table in the README.
    """

    groups: tuple[Group, ...]
    models: Mapping[str, Model]
    left_out: tuple[str, ...] = ()
    featured: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """The result of a model on a data set.

    Attributes:
        value: The figure.
        low: Lower 95 % limit over users.
        high: The upper limit; see ``low``.
        best: Whether the best model of the data set is not shown to be better.
        rank: Rank among the models of the data set, 1 for the best.
        page: The page with the result, if it is not that of the column.
    """

    value: float
    low: float | None
    high: float | None
    best: bool
    rank: int
    page: str = ""


@dataclass(frozen=True)
class LeaderboardRow:
    """A model with its results, None where it was not run."""

    name: str
    model: Model
    type: ModelType
    training: float | None
    answer: float | None
    cells: tuple[Cell | None, ...]
    mean_rank: float | None


@dataclass(frozen=True)
class LeaderboardTable:
    """A table of the leaderboard."""

    title: str
    metric: str
    columns: tuple[Column, ...]
    lines: tuple[LeaderboardRow, ...]
    published: tuple[tuple[str, str, tuple[float | None, ...]], ...]


def read_leaderboard_config(folder: Path) -> LeaderboardConfig | None:
    """Read the settings of the leaderboard from a folder; None if there are none.

    Raises:
        DataError: If the file cannot be used.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        return LeaderboardConfig.model_validate(parse_yaml(path.read_text(encoding="utf-8"), path)[0])
    except (OSError, RecipeError, ValidationError, ValueError) as error:
        raise DataError(
            f"{path}: invalid leaderboard settings ({single_line(str(error))}); see "
            "llmrec.bench.leaderboard.LeaderboardConfig",
            kind="wrong-format",
            at=path,
        ) from error


def leaderboard_pages(folder: Path, references: Mapping[str, Reference] | None = None) -> dict[str, str]:
    """Return the pages and data of the leaderboard for a folder of results; empty without settings.

    Args:
        folder: The folder of results; the settings are in its parent folder.
        references: Pages of published figures by name; None: those of llmrec.

    Raises:
        DataError: If the settings or a result cannot be used.
        LlmrecError: If the rows of one table were measured under different protocols.
    """
    board = read_leaderboard_config(folder.parent)
    if board is None:
        return {}
    return pages(board, read_benchmark_results(folder), read_references() if references is None else references)


def rewrite(folder: Path) -> list[Path]:
    """Write the leaderboard and the benchmark pages for a folder of results, and return their paths.

    Args:
        folder: The folder ``eval/results``; no page is written for another folder, such as that of a run.

    Raises:
        DataError: If a file is not JSON or is incomplete.
        LlmrecError: If the rows of one table were measured under different protocols.
    """
    if not folder.is_dir() or (folder / "results.json").is_file():
        return []
    board, references = read_leaderboard_config(folder.parent), read_references()
    results = read_benchmark_results(folder)
    pages_by_name = {} if board is None else pages(board, results, references)
    for result in results:
        pages_by_name |= benchmark_pages(result, references)
    for name, text in pages_by_name.items():
        write_text(folder.parent / name, text)
    return [folder.parent / name for name in pages_by_name]


def leaderboard_tables(
    board: LeaderboardConfig, results: Sequence[BenchmarkResult], references: Mapping[str, Reference]
) -> Iterator[LeaderboardTable]:
    """Yield the tables of the leaderboard; data sets without results are left out."""
    known = {result.benchmark: result for result in results}
    for group in board.groups:
        columns = tuple(column for column in group.columns if column.suite in known)
        if not columns:
            continue
        sources = [_column_results(column, known) for column in columns]
        lines = list(_leaderboard_rows(board, sources))
        metric = sources[0].table.metric
        lines.sort(key=lambda line: _row_sort_key(line, metric))
        published = _best_published(board, sources, references, metric)
        yield LeaderboardTable(group.title, metric, columns, tuple(lines), published)


def undescribed_models(board: LeaderboardConfig, results: Sequence[BenchmarkResult]) -> list[str]:
    """Return the models that have results but are not mentioned in the leaderboard settings."""
    suites = {name for group in board.groups for column in group.columns for name in (column.suite, *column.further)}
    rows = {row.name for result in results if result.benchmark in suites for row in result.rows}
    return sorted(rows - set(board.models) - set(board.left_out))


def pages(
    board: LeaderboardConfig, results: Sequence[BenchmarkResult], references: Mapping[str, Reference]
) -> dict[str, str]:
    """Return the page of the leaderboard and its data for the site, by file name."""
    tables = list(leaderboard_tables(board, results, references))
    views = [{"matrix": matrix, "grid": Markup(_full_table(matrix))} for matrix in tables]
    text = benchmark_environment().get_template("leaderboard.md.j2").render(views=views)
    return {PAGE: text, DATA: json.dumps([_as_json(matrix) for matrix in tables], indent=1) + "\n"}


def featured(board: LeaderboardConfig, matrix: LeaderboardTable) -> LeaderboardTable:
    """Return a table of the leaderboard with only its featured models, in the same order."""
    lines = tuple(line for line in matrix.lines if line.name in board.featured)
    return replace(matrix, lines=lines, published=())


def short_table(matrix: LeaderboardTable, folder: str) -> str:
    """Return a table of the leaderboard without ranks and times.

    Args:
        matrix: The table.
        folder: The folder of the benchmarks' pages, as links begin.
    """
    head = ["Model", *_column_links(matrix, folder), "Type"]
    lines = [
        [escape_cell(line.model.title), *(_format_cell(entry, folder) for entry in line.cells), line.type]
        for line in matrix.lines
    ]
    return markdown_table(head, lines, 1, len(head) - 1)


# --------------------------------------------------------------------------- one table


@dataclass(frozen=True)
class _ColumnResults:
    """The results of a column, with models of further suites; ``pages`` has the pages of these models by name."""

    result: BenchmarkResult
    table: BenchmarkTable
    pages: Mapping[str, str]


def _column_results(column: Column, known: Mapping[str, BenchmarkResult]) -> _ColumnResults:
    """Return the results of a column; a further suite is left out if it has other data or another protocol."""
    result, pages = known[column.suite], dict[str, str]()
    table = next((table for table in result.tables if table.name == column.table), result.tables[0])
    for other, names in ((known[suite], names) for suite, names in column.further.items() if suite in known):
        every = [*result.standings(table), *other.standings(table)]
        if result.data != other.data or len({figures.metrics[table.metric].signature for _, figures in every}) > 1:
            continue
        kept = [row for row in result.rows if row.name not in names]
        rows = [row for row in other.rows if row.name in names]
        result = result.model_copy(update={"rows": (*kept, *rows)})
        pages |= {row.name: f"{other.benchmark}.md" for row in rows}
    return _ColumnResults(result, table, pages)


def _leaderboard_rows(board: LeaderboardConfig, columns: Sequence[_ColumnResults]) -> Iterator[LeaderboardRow]:
    standings = [_cells_by_model(board, column) for column in columns]
    controls = {row.name for column in columns for row in column.result.rows if _model_type(row) == "control"}
    complete = {name for name in standings[0] if all(name in cells for cells in standings)} - controls
    for name in dict.fromkeys(name for cells in standings for name in cells):
        rows = [(column.result, row) for column in columns for row in column.result.rows if row.name == name]
        cells = tuple(standing.get(name) for standing in standings)
        ranks = [_rank_among(standing, complete, name) for standing in standings] if name in complete else []
        yield LeaderboardRow(
            name,
            board.models[name],
            board.models[name].type or _model_type(rows[0][1]),
            _mean_of_known([_training_seconds(row) for _, row in rows]),
            _mean_of_known([_request_milliseconds(result, row) for result, row in rows]),
            cells,
            float(np.mean(ranks)) if len(ranks) > 1 else None,
        )


def _cells_by_model(board: LeaderboardConfig, column: _ColumnResults) -> dict[str, Cell]:
    """Return the results on a data set by model, best first."""
    table = column.table
    # The best model is compared with all others; models to which it is not significantly superior count as equal. With
    # models of further suites it is not compared, so these only count as best if their value is.
    beaten = {
        pair.b
        for pair in column.result.comparisons
        if pair.table == table.name and pair.low is not None and pair.high is not None and pair.low * pair.high > 0
    }
    # An ensemble that uses a single member is counted as that member.
    entries = [
        (row, entry.metrics[table.metric])
        for row, entry in column.result.standings(table)
        if row.name in board.models and not (entry.fusion and entry.fusion.form == "alone")
    ]
    figures = [(row.name, figure) for row, figure in entries if figure.value is not None]
    return {
        name: Cell(
            figure.value or 0.0,
            figure.low,
            figure.high,
            rank == 1 if name in column.pages else name not in beaten,
            rank,
            column.pages.get(name, ""),
        )
        for rank, (name, figure) in enumerate(figures, 1)
    }


def _rank_among(standing: Mapping[str, Cell], names: set[str], name: str) -> int:
    return 1 + sum(cell.rank < standing[name].rank for other, cell in standing.items() if other in names)


def _model_type(row: BenchmarkRow) -> ModelType:
    if row.baseline == "random":
        return "control"
    if any(figures.fusion for figures in row.tables.values()):
        return "ensemble"
    if row.reads == "language model":
        # Ranking baselines may fine-tune text encoders; generative models come from recipes.
        return "fine-tuned text encoder" if row.baseline else "language model"
    return "text" if row.reads == "texts" else "interactions"


def _training_seconds(row: BenchmarkRow) -> float | None:
    """Return the seconds of training; None if only tuning was timed."""
    spent = row.seconds.get("fit", 0.0)
    if any(figures.fusion for figures in row.tables.values()):
        spent += row.seconds.get("tune", 0.0)
    elif spent < _MIN_EXACT_SECONDS and row.seconds.get("tune", 0.0) > _MIN_EXACT_SECONDS:
        return None
    return spent / row.seeds


def _request_milliseconds(result: BenchmarkResult, row: BenchmarkRow) -> float:
    """Return the milliseconds per request in the evaluation."""
    requests = sum(figures.n for figures in row.tables.values()) * row.seeds
    return 1000 * row.seconds.get("answer", 0.0) / max(1, requests)


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _row_sort_key(line: LeaderboardRow, metric: str) -> tuple[bool, float, bool, float]:
    """Return the sort key of a model, by mean rank and then by a metric."""
    known = [cell for cell in line.cells if cell is not None]
    return line.type == "control", float(np.mean([cell.rank for cell in known])), *sort_key(known[0].value, metric)


def _best_published(
    board: LeaderboardConfig, columns: Sequence[_ColumnResults], references: Mapping[str, Reference], metric: str
) -> tuple[tuple[str, str, tuple[float | None, ...]], ...]:
    """Return the best published systems on each data set, with sources and results.

    They are ordered by their best rank among the published systems of a column, then by the number of their figures.
    """
    systems: dict[str, dict[int, PublishedResult]] = {}
    ranks: dict[str, int] = {}
    for number, column in enumerate(columns):
        rows = published_results(column.result, references, column.table.name)
        rows = [row for row in rows if metric in row.values]
        rows = [row for row in rows if row.system not in board.left_out]
        best: dict[str, PublishedResult] = {}
        for row in sorted(rows, key=lambda row: sort_key(row.values[metric], metric)):
            best.setdefault(row.system, row)
        for rank, (system, row) in enumerate(best.items(), 1):
            systems.setdefault(system, {})[number] = row
            ranks[system] = min(rank, ranks.get(system, rank))
    order = sorted(systems, key=lambda system: (ranks[system], -len(systems[system]), system))
    lines = []
    for system in order[:_MAX_PUBLISHED]:
        figures = systems[system]
        values = [figures[number].values[metric] if number in figures else None for number in range(len(columns))]
        lines.append((system, "; ".join(dict.fromkeys(row.source for row in figures.values())), tuple(values)))
    return tuple(lines)


# --------------------------------------------------------------------------- writing


def _full_table(matrix: LeaderboardTable) -> str:
    ranked = any(line.mean_rank is not None for line in matrix.lines)
    head = ["model", *_column_links(matrix)]
    head += ["mean rank"] if ranked else []
    head += ["type", "pretrained", "training", "ms per request"]
    lines = []
    for line in matrix.lines:
        row = [escape_cell(line.model.title), *map(_format_cell, line.cells)]
        row += [DASH if line.mean_rank is None else f"{line.mean_rank:.1f}"] if ranked else []
        row += [line.type, escape_cell(line.model.pretrained or DASH), _format_time(line.training)]
        lines.append([*row, DASH if line.answer is None else f"{line.answer:.1f}"])
    for system, _, values in matrix.published:
        cells = [DASH if value is None else f"*{value:.4f}*" for value in values]
        lines.append([f"*{escape_cell(system)}*", *cells, *([""] if ranked else []), "*published*", "", "", ""])
    return markdown_table(head, lines, numeric_from=1)


def _column_links(matrix: LeaderboardTable, folder: str = "") -> list[str]:
    return [f"[{escape_cell(column.title)}]({folder}{column.suite}.md)" for column in matrix.columns]


def _format_cell(entry: Cell | None, folder: str = "") -> str:
    if entry is None:
        return DASH
    text = f"**{entry.value:.4f}**" if entry.best else f"{entry.value:.4f}"
    return f"[{text}]({folder}{entry.page})" if entry.page else text


def _format_time(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < _MIN_EXACT_SECONDS:
        return "< 1 s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _as_json(matrix: LeaderboardTable) -> dict[str, Any]:
    return {
        "title": matrix.title,
        "metric": matrix.metric,
        "lower": is_lower_better(matrix.metric),
        "columns": [{"title": column.title, "page": f"{column.suite}.html"} for column in matrix.columns],
        "rows": [
            {
                "model": line.model.title,
                "type": line.type,
                "pretrained": line.model.pretrained,
                "cells": [
                    entry and {"value": entry.value, "low": entry.low, "high": entry.high, "best": entry.best}
                    for entry in line.cells
                ],
                "mean_rank": line.mean_rank,
                "training": line.training,
                "answer": line.answer,
            }
            for line in matrix.lines
        ],
        "published": [
            {"model": system, "source": source, "cells": list(values)} for system, source, values in matrix.published
        ],
    }
