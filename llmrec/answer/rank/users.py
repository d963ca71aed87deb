"""`llmrec rank --all-users --to`: writes a ranked list for every user to a file or a database table.

Users are ranked in parts, which are kept until all are complete, so that a killed call can resume.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import fields
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.answer.loaded import Loaded
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.outputs import check_out, write_summary
from llmrec.answer.rank.ranker import open_loaded
from llmrec.answer.rank.run import RankBar
from llmrec.data.cells import write_rows
from llmrec.data.ranked import ENDINGS, Ranked, write_lists
from llmrec.data.read.databases import file_of
from llmrec.durable import replacing
from llmrec.errors import DataError, LlmrecError, require
from llmrec.fingerprint import digest_of
from llmrec.pipeline.resume import LOCK, locked

TABLE = "recommendations"
"""The table in a database; it is replaced in one transaction."""

_PART = 256
# Options that do not change the lists.
_NEUTRAL = frozenset({"gpu_memory", "enforce_eager"})
_FILES = (".parquet", ".csv", ".jsonl", *ENDINGS)
_DATABASES = (".db", ".sqlite", ".sqlite3")
_COLUMNS = ("user_id", "rank", "item_id", "title", "score", "error")
_TABLE_COLUMNS = (
    "SELECT column_name FROM information_schema.columns WHERE table_schema = current_schema() "
    f"AND table_name = '{TABLE}' ORDER BY ordinal_position"
)


def rank_users(options: RankOptions) -> Mapping[str, str | int]:
    """Rank the whole catalogue for every user, and return a summary to print.

    Raises:
        LlmrecError: If the model has no users, or the target cannot be written.
    """
    if options.to is None:
        raise DataError("--all-users requires --to with a file or a database", kind="missing-key", column="--to")
    _refuse_others(options)
    kind, to = _target(options.to)
    if kind == "sqlite":
        _check_sqlite(Path(to))
    elif "://" not in to:
        by = "rank --all-users"
        check_out(Path(to), (options.items,), option="--to", by=by, parts=_parts(to), restart=options.restart)
    k = options.top or 10
    with ExitStack() as opened:
        rec = opened.enter_context(open_loaded(options))
        if not rec.users:
            raise DataError(
                f"--all-users: {options.model} has no users; give a run folder, whose data contains users",
                kind="empty",
                column="--all-users",
            )
        opened.enter_context(locked(_parts(to), _own))
        users, signature = rec.users[: options.limit], rec.signature()
        # If an engine does not fit into memory, continue with a smaller one.
        changing = [field.name for field in fields(RecommenderOptions) if field.name not in _NEUTRAL]
        asks = {name: repr(getattr(options, name)) for name in changing}
        key = digest_of(signature=signature, k=k, users=users, histories=rec.histories, by=options.by, asked=asks)
        if options.restart:
            for path in _parts(to).glob("part-*.parquet"):
                path.unlink()
        paths = list(_ranked(rec, users, _parts(to), key, k, options.strategy))
        table = pa.concat_tables([pq.read_table(path) for path in paths])
        _write(kind, to, table, (options.by or rec.models[0]).replace(" ", "-"))
        failed = int(table.num_rows - table["error"].null_count)
        if "://" not in to:
            write_summary(Path(to), {"model": signature, "users": len(users), "rows": table.num_rows, "failed": failed})
        for path in paths:
            path.unlink()
    _parts(to).joinpath(LOCK).unlink(missing_ok=True)
    # keeps the folder if it contains other files
    with suppress(OSError):
        _parts(to).rmdir()
    return {
        "model": f"{options.by or rec.models[0]} ({signature})",
        "users": len(users),
        "rows": table.num_rows - failed,
        "failed": failed,
        "written to": _shown(to),
    }


def _refuse_others(options: RankOptions) -> None:
    """Reject options that do not apply with ``--all-users``."""
    plain = RankOptions()
    named = ("requests", "out", "form", "fuse", "retrieve", "rationale", "candidates", "template", "task")
    for name in (*named, "shard", "ray", *(("by",) if options.baseline is not None else ("settings",))):
        if getattr(options, name) != getattr(plain, name):
            option = {"requests": "--in", "settings": "--set"}.get(name, f"--{name}")
            raise DataError(
                f"{option} has no effect with --all-users, which ranks the catalogue with --by; drop one of them",
                kind="contradiction",
                column=option,
            )


def _ranked(rec: Loaded, users: Sequence[str], folder: Path, key: str, k: int, strategy: str) -> Iterator[Path]:
    """Rank the users in parts and yield the file of each part; existing parts are not ranked again."""
    with RankBar(len(users)) as bar:
        for start in range(0, len(users), _PART):
            part = users[start : start + _PART]
            path = folder / f"part-{start // _PART:06d}-{key[:16]}.parquet"
            if path.is_file():
                bar.skip(len(part))
            else:
                result = rec.recommend(pa.table({"id": part, "user_id": part}), k=k, strategy=strategy)
                with replacing(path) as draft:
                    pq.write_table(result.select(_COLUMNS), draft)
                bar.advance(len(part))
            yield path


def _target(to: str) -> tuple[str, str]:
    """Return the type of the target (a file extension, ``sqlite`` or ``postgresql``), and its path or address."""
    if to.startswith(("postgresql://", "postgres://")):
        require("adbc_driver_postgresql", "tables")
        return "postgresql", to
    if to.startswith("sqlite:///") and (file := file_of(to)).name:
        return "sqlite", str(file)
    suffix = Path(to).suffix.lower()
    if "://" not in to and suffix in _DATABASES:
        return "sqlite", to
    if "://" not in to and suffix in _FILES:
        return suffix, to
    raise DataError(
        f"--to {_shown(to)}: supported targets are {', '.join((*_FILES, *_DATABASES))}, sqlite:///FILE or "
        "postgresql://...",
        kind="wrong-format",
        column="--to",
    )


def _write(kind: str, to: str, table: pa.Table, tag: str) -> None:
    if kind == "postgresql":
        _write_postgres(to, table)
    elif kind == "sqlite":
        _write_sqlite(Path(to), table)
    elif kind in ENDINGS:
        write_lists(Path(to), _records(table), ENDINGS[kind], tag)
    else:
        with replacing(Path(to)) as draft:
            if kind == ".parquet":
                pq.write_table(table, draft)
                return
            if kind == ".jsonl":
                pl.DataFrame(pl.from_arrow(table)).write_ndjson(draft)
                return
            with draft.open("w", encoding="utf-8", newline="") as stream:
                rows = (row.values() for batch in table.to_batches() for row in batch.to_pylist())
                write_rows(stream, _COLUMNS, rows)


def _records(table: pa.Table) -> Iterator[Ranked]:
    """Yield the ranked lists in a table of ranked items."""
    for line, (user, rows) in enumerate(groupby(table.to_pylist(), itemgetter("user_id")), start=1):
        ranked = [row for row in rows if row["error"] is None]
        yield Ranked(
            request_id=user,
            user_id=user,
            line=line,
            items=tuple(row["item_id"] for row in ranked),
            scores=tuple(row["score"] for row in ranked),
        )


def _write_sqlite(path: Path, table: pa.Table) -> None:
    """Replace a table in an SQLite file; other tables are unchanged."""
    rows = [tuple(row[name] for name in _COLUMNS) for row in table.to_pylist()]
    try:
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("BEGIN IMMEDIATE")
            _check_table(path, database)
            database.execute(f"DROP TABLE IF EXISTS {TABLE}")
            database.execute(
                f"CREATE TABLE {TABLE} (user_id TEXT, rank INTEGER, item_id TEXT, title TEXT, score REAL, error TEXT)"
            )
            database.executemany(f"INSERT INTO {TABLE} VALUES (?, ?, ?, ?, ?, ?)", rows)
            database.execute(f"CREATE INDEX {TABLE}_by_user ON {TABLE} (user_id, rank)")
    except sqlite3.Error as error:
        raise DataError(f"--to {path}: {error}", kind="unreadable", at=path, column="--to") from None


def _check_sqlite(path: Path) -> None:
    """Raise an error if a database cannot be written, before ranking; see `_check_table`."""
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            _check_table(path, database)
    except sqlite3.Error as error:
        raise DataError(f"--to {path}: {error}", kind="unreadable", at=path, column="--to") from None


def _check_table(path: Path, database: sqlite3.Connection) -> None:
    """Reject a database file of another program, and an existing table that is not a table of ranked lists."""
    owner = database.execute("PRAGMA application_id").fetchone()[0]
    columns = tuple(row[1] for row in database.execute(f"PRAGMA table_info({TABLE})"))
    if owner or columns not in ((), _COLUMNS):
        what = "belongs to another program" if owner else f"has another table {TABLE!r}"
        raise DataError(f"--to {path} {what}; choose another file", kind="exists", at=path, column="--to")


def _write_postgres(url: str, table: pa.Table) -> None:
    dbapi = require("adbc_driver_postgresql.dbapi", "tables")
    try:
        with dbapi.connect(url) as database, database.cursor() as cursor:
            cursor.execute(_TABLE_COLUMNS)
            columns = tuple(row[0] for row in cursor.fetchall())
            if columns not in ((), _COLUMNS):
                raise DataError(
                    f"--to {_shown(url)} has another table {TABLE!r}; choose another database or schema",
                    kind="exists",
                    column="--to",
                )
            cursor.adbc_ingest(TABLE, table, mode="replace")
            database.commit()
    except LlmrecError:
        raise
    except Exception as error:
        # The message of the driver may contain the address with its password.
        message = str(error).replace(url, _shown(url)).splitlines()[0]
        raise LlmrecError(f"--to {_shown(url)}: {message}", kind="failed", column="--to") from None


def _shown(to: str) -> str:
    """Return a target without the password in its address."""
    if "://" not in to:
        return to
    parts = urlsplit(to)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"


def _parts(to: str) -> Path:
    """Return the folder of parts: next to an output file, or in the working folder for a database."""
    path = Path(f"{TABLE}-{digest_of(to=to)[:8]}") if "://" in to else Path(to)
    return path.with_name(path.name + ".parts")


def _own(name: str) -> bool:
    return name == ".lock" or (name.startswith((".part-", "part-")) and ".parquet" in name)
