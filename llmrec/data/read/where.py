"""Filters the rows of a table by an expression that compares columns, in a small subset of Python's grammar.

No code of an expression is run: it is parsed, and every node must be one of `_GRAMMAR`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import polars as pl
from polars import selectors

from llmrec.data.read.limits import format_names, format_value
from llmrec.data.read.tables import Table, check_usable, concatenate_tables
from llmrec.data.read.typed import text_column
from llmrec.errors import DataError, RecipeError, did_you_mean

WHERE_KEY = "data.filter.where"
_GRAMMAR = (
    "columns, texts in quotes, numbers, ==, !=, <, <=, >, >=, in and not in with a list, is None and is not None, and, "
    "or, not, brackets, and col('a name') for a column whose name is not a word"
)
_MAX_LENGTH, _MAX_DEPTH = 2000, 50
_DOTTED_NAME = re.compile(r"\w+(\.\w+)*")
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[pl.Expr, Any], pl.Expr]] = {
    ast.Eq: lambda one, two: one == two,
    ast.NotEq: lambda one, two: one != two,
    ast.Lt: lambda one, two: one < two,
    ast.LtE: lambda one, two: one <= two,
    ast.Gt: lambda one, two: one > two,
    ast.GtE: lambda one, two: one >= two,
}
# Operators after swapping the sides of a comparison.
_SWAPPED_OPERATORS: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}


def filter_rows(table: Table, where: str) -> Table:
    """Return the rows of a table that satisfy an expression.

    A missing value is neither equal to, unequal to, less than nor greater than anything.

    Args:
        table: The table as read.
        where: Such as ``event == 'purchase' and quantity > 0``. Texts are compared exactly, numbers as numbers.

    Raises:
        RecipeError: If the expression is outside the grammar.
        DataError: If a column is missing, a cell compared with a number is not a number, or no row satisfies it.
    """
    results = [rows for part in table.parts or (table,) if (rows := _filter_file(part, where)).frame.height]
    if not results:
        raise DataError.at(
            table.name,
            "empty",
            f": no row of {table.frame.height} satisfies {WHERE_KEY} ({format_value(where)}); correct the condition",
            WHERE_KEY,
        )
    return replace(concatenate_tables(results), name=table.name, sha256=table.sha256) if table.parts else results[0]


def _filter_file(table: Table, where: str) -> Table:
    """Return the rows of one file that satisfy an expression, which may be none."""
    chosen = _Parser(table).parsed(where)
    # Codes are compared as texts; only the named columns are expanded.
    frame = table.frame.lazy().with_columns(selectors.enum().cast(pl.String))
    satisfied = frame.select(chosen.fill_null(value=False).alias("held")).collect()["held"]
    rows = satisfied.arg_true()
    return table if len(rows) == table.frame.height else table.select_rows(rows)


@dataclass(frozen=True)
class _Parser:
    table: Table

    def parsed(self, where: str) -> pl.Expr:
        if len(where) > _MAX_LENGTH:
            raise _condition_error(f"the condition has {len(where)} characters, more than {_MAX_LENGTH}")
        try:
            return self._translate_condition(ast.parse(where.strip(), mode="eval").body, 0)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise _condition_error(
                f"{format_value(where)} is not an expression ({getattr(error, 'msg', None) or error})"
            ) from None

    def _translate_condition(self, node: ast.expr, depth: int) -> pl.Expr:
        if depth > _MAX_DEPTH:
            raise _condition_error("the condition is nested too deeply")
        if isinstance(node, ast.BoolOp):
            combine = pl.all_horizontal if isinstance(node.op, ast.And) else pl.any_horizontal
            return combine(self._translate_condition(value, depth + 1) for value in node.values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._translate_condition(node.operand, depth + 1)
        if isinstance(node, ast.Compare):
            return self._translate_comparison(node)
        raise _condition_error(f"{_format_node(node)} is not a condition; compare a column with a value")

    def _translate_comparison(self, node: ast.Compare) -> pl.Expr:
        """Translate a comparison; ``1 <= stars <= 5`` becomes the conjunction of its two comparisons."""
        sides = [node.left, *node.comparators]
        return pl.all_horizontal(
            self._translate_pair(left, op, right) for left, op, right in zip(sides, node.ops, sides[1:], strict=False)
        )

    def _translate_pair(self, one: ast.expr, op: ast.cmpop, two: ast.expr) -> pl.Expr:
        left, right = self._name(one), self._name(two)
        if left is None and right is not None and type(op) in _SWAPPED_OPERATORS:
            return self._translate_pair(two, _SWAPPED_OPERATORS[type(op)](), one)
        if left is None:
            raise _condition_error(f"{_format_node(one)} is not a column; write the column on the left")
        if isinstance(op, ast.In | ast.NotIn):
            return self._translate_membership(left, two, isinstance(op, ast.NotIn))
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(two, ast.Constant) and two.value is None):
                raise _condition_error("`is` and `is not` accept only None")
            empty = self._text(left).is_null()
            return empty if isinstance(op, ast.Is) else ~empty
        if right is not None:
            return _COMPARISONS[type(op)](*self._align_columns(left, right))
        value = _literal_value(two)
        if value is None:
            raise _condition_error(f"{left} is compared with None; write `is None` or `is not None` instead")
        return _COMPARISONS[type(op)](*self._alike(left, value))

    def _translate_membership(self, column: str, node: ast.expr, out: bool) -> pl.Expr:
        if not isinstance(node, ast.List | ast.Tuple | ast.Set) or not node.elts:
            raise _condition_error("`in` and `not in` require a list of values, such as ['view', 'buy']")
        values = [_literal_value(element) for element in node.elts]
        if None in values:
            raise _condition_error("a list contains None; add a condition with `is None` or `is not None`")
        result = pl.any_horizontal(cells == other for cells, other in (self._alike(column, v) for v in values))
        return ~result if out else result

    def _align_columns(self, left: str, right: str) -> tuple[pl.Expr, pl.Expr]:
        """Convert two columns to a common type: numbers if both have only numbers, else times or texts."""
        kinds = [self.table.frame[name].dtype for name in (left, right)]
        if all(kind.is_temporal() for kind in kinds):
            return self._time(left), self._time(right)
        numbers = [self._is_numeric_column(name) for name in (left, right)]
        if all(numbers):
            return self._number(left), self._number(right)
        if any(kind.is_numeric() or kind.is_temporal() for kind in kinds):
            raise _condition_error(f"{left} and {right} have values of different types, which cannot be compared")
        return self._text(left), self._text(right)

    def _is_numeric_column(self, column: str) -> bool:
        if self.table.frame[column].dtype.is_numeric():
            return True
        cells = self.table.frame.select(self._text(column).str.strip_chars()).to_series().drop_nulls()
        return len(cells) > 0 and bool(_finite_mask(cells).all())

    def _time(self, column: str) -> pl.Expr:
        return pl.col(column).cast(pl.Datetime("us")).dt.replace_time_zone(None)

    def _alike(self, column: str, value: Any) -> tuple[pl.Expr, Any]:
        """Convert a column and a value to a common type."""
        kind = self.table.frame[column].dtype
        if isinstance(value, bool):
            if kind == pl.Boolean:
                return pl.col(column), value
            return self._text(column).str.to_lowercase(), str(value).lower()
        if isinstance(value, int | float):
            try:
                return self._number(column), float(value)
            except OverflowError:
                raise _condition_error(f"{format_value(value)} is too large") from None
        if kind.is_temporal():
            return self._time(column), _parse_time(str(value))
        return self._text(column), value

    def _text(self, column: str) -> pl.Expr:
        # Written as loaded: integers that became floats are integers.
        cells = pl.lit(text_column(self.table, column))
        return pl.when(cells.str.strip_chars() == "").then(None).otherwise(cells)

    def _number(self, column: str) -> pl.Expr:
        series = self.table.frame[column]
        if series.dtype.is_numeric():
            return pl.col(column).cast(pl.Float64).fill_nan(None)
        cells = self.table.frame.select(self._text(column).str.strip_chars()).to_series()
        bad = (~_finite_mask(cells) & cells.is_not_null()).arg_true()
        if len(bad):
            raise DataError.at(
                self.table.where(int(bad[0])),
                "bad-value",
                f": column {column!r} is {format_value(cells[int(bad[0])])}, but {WHERE_KEY} compares this column with "
                "a number; correct the row, or compare the column with a text in quotes",
                column,
            )
        return self._text(column).str.strip_chars().cast(pl.Float64)

    def _name(self, node: ast.expr) -> str | None:
        """Return the column that a node names; None if the node is not a name."""
        if isinstance(node, ast.Name | ast.Attribute) and _DOTTED_NAME.fullmatch(name := ast.unparse(node)):
            pass
        elif isinstance(node, ast.Call):
            plain = isinstance(node.func, ast.Name) and node.func.id == "col" and not node.keywords
            if not plain or len(node.args) != 1 or not isinstance(_literal_value(node.args[0]), str):
                raise _condition_error(f"{_format_node(node)} is a call; only col('a name') is allowed")
            name = str(_literal_value(node.args[0]))
        else:
            return None
        columns = self.table.frame.columns
        if name not in columns:
            check_usable(self.table, name, WHERE_KEY)
            raise DataError.at(
                self.table.name,
                "missing-column",
                f" has no column {name!r}{did_you_mean(name, columns)}, which {WHERE_KEY} names; its columns are: "
                f"{format_names(columns)}. Texts need quotes",
                name,
            )
        return name


def _finite_mask(cells: pl.Series) -> pl.Series:
    """Return, for each text, whether it is a finite number."""
    return cells.cast(pl.Float64, strict=False).is_finite().fill_null(value=False)


def _literal_value(node: ast.expr) -> Any:
    """Return the value of a literal: a text, a number, a boolean or None."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _literal_value(node.operand)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | bool | int | float)):
        return node.value
    raise _condition_error(f"{_format_node(node)} is not a value")


def _parse_time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise _condition_error(f"{format_value(text)} is not a time such as 2024-05-31 or 2024-05-31T08:15") from None
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


def _format_node(node: ast.expr) -> str:
    return format_value(ast.unparse(node))


def _condition_error(what: str) -> RecipeError:
    return RecipeError(f"{WHERE_KEY}: {what}. It supports {_GRAMMAR}", kind="syntax", column=WHERE_KEY)
