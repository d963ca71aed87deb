"""`llmrec rank --all-users --to`: writes a ranked list for every user to a file or a database table.

Users are ranked in parts, which are kept until all are complete, so that a killed call can resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec.answer.loaded import Loaded
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.outputs import check_output_file, write_summary
from llmrec.answer.rank.ranker import open_recommender
from llmrec.answer.rank.run import RankProgress
from llmrec.data.cells import write_rows
from llmrec.data.database_output import DATABASE_ADDRESS_FORMS, SQLITE_ENDINGS, Database, without_password
from llmrec.data.ranked import FORM_ENDINGS, LIST_INDEX, LIST_SCHEMA, LIST_TABLE, RankingRecord, write_lists
from llmrec.durable import replace_atomically
from llmrec.errors import DataError
from llmrec.fingerprint import digest_of
from llmrec.pipeline.resume import LOCK_FILE, lock_folder

_PART_SIZE = 256
# Options that do not change the lists.
_NEUTRAL_OPTIONS = frozenset({"gpu_memory", "enforce_eager"})
_FILE_ENDINGS = (".parquet", ".csv", ".jsonl", *FORM_ENDINGS)


def rank_users(options: RankOptions) -> Mapping[str, str | int]:
    """Rank the whole catalogue for every user, and return a summary to print.

    Raises:
        LlmrecError: If the model has no users, or the target cannot be written.
    """
    if options.to is None:
        raise DataError("--all-users requires --to with a file or a database", kind="missing-key", column="--to")
    _check_unused_options(options)
    database = Database.of(options.to, "--to")
    to = options.to if database is None else database.at
    if database is not None:
        database.check(LIST_TABLE, LIST_SCHEMA, replace=options.restart)
    else:
        _check_target_type(to)
        by = "rank --all-users"
        check_output_file(
            Path(to), (options.items,), option="--to", by=by, parts=_parts_folder(to), restart=options.restart
        )
    k = options.top or 10
    with ExitStack() as opened:
        rec = opened.enter_context(open_recommender(options))
        if not rec.users:
            raise DataError(
                f"--all-users: {options.model} has no users; give a run folder, whose data contains users",
                kind="empty",
                column="--all-users",
            )
        opened.enter_context(lock_folder(_parts_folder(to), _is_part_file))
        users, signature = rec.users[: options.limit], rec.signature()
        # If an engine does not fit into memory, continue with a smaller one.
        changing = [field.name for field in fields(RecommenderOptions) if field.name not in _NEUTRAL_OPTIONS]
        settings = {name: repr(getattr(options, name)) for name in changing}
        key = digest_of(signature=signature, k=k, users=users, histories=rec.histories, by=options.by, asked=settings)
        # Unused parts of a killed call with other options would turn off the protection of the output.
        for path in _parts_folder(to).iterdir():
            if path.name != LOCK_FILE and _is_part_file(path.name) and (options.restart or key not in path.name):
                path.unlink()
        paths = list(_rank_in_parts(rec, users, _parts_folder(to), key, k, options.strategy))
        table = pa.concat_tables([pq.read_table(path) for path in paths])
        if database is not None:
            database.write(LIST_TABLE, table, index=LIST_INDEX, replace=options.restart)
        else:
            _write_table(Path(to), table, (options.by or rec.models[0]).replace(" ", "-"))
        failed = int(table.num_rows - table["error"].null_count)
        if database is None or database.file is not None:
            write_summary(Path(to), {"model": signature, "users": len(users), "rows": table.num_rows, "failed": failed})
        for path in paths:
            path.unlink()
    _parts_folder(to).joinpath(LOCK_FILE).unlink(missing_ok=True)
    # keeps the folder if it contains other files
    with suppress(OSError):
        _parts_folder(to).rmdir()
    return {
        "model": f"{options.by or rec.models[0]} ({signature})",
        "users": len(users),
        "rows": table.num_rows - failed,
        "failed": failed,
        "written to": to if database is None else database.shown,
    }


def _check_unused_options(options: RankOptions) -> None:
    """Reject options that do not apply with ``--all-users``."""
    named = ("requests", "out", "form", "fuse", "retrieve", "rationale", "candidates", "template", "task")
    more = ("shard", "ray", "settings" if options.baseline is None else "by")
    if unused := options.given((*named, *more)):
        option = {"requests": "--in", "settings": "--set"}.get(unused[0], f"--{unused[0]}")
        raise DataError(
            f"{option} has no effect with --all-users, which ranks the catalogue with --by; drop {option}",
            kind="contradiction",
            column=option,
        )


def _rank_in_parts(rec: Loaded, users: Sequence[str], folder: Path, key: str, k: int, strategy: str) -> Iterator[Path]:
    """Rank the users in parts and yield the file of each part; existing parts are not ranked again."""
    with RankProgress(len(users)) as bar:
        for start in range(0, len(users), _PART_SIZE):
            part = users[start : start + _PART_SIZE]
            path = folder / f"part-{start // _PART_SIZE:06d}-{key}.parquet"
            if path.is_file():
                bar.skip(len(part))
            else:
                result = rec.recommend(pa.table({"id": part, "user_id": part}), k=k, strategy=strategy)
                with replace_atomically(path) as draft:
                    pq.write_table(result.select(LIST_SCHEMA.names), draft)
                bar.answered(len(part))
            yield path


def _check_target_type(to: str) -> None:
    """Reject a path or an address whose type is not supported."""
    if "://" in to or Path(to).suffix.lower() not in _FILE_ENDINGS:
        raise DataError(
            f"--to {without_password(to) if '://' in to else to}: supported targets are "
            f"{', '.join((*_FILE_ENDINGS, *SQLITE_ENDINGS))}, {DATABASE_ADDRESS_FORMS}",
            kind="wrong-format",
            column="--to",
        )


def _write_table(path: Path, table: pa.Table, tag: str) -> None:
    kind = path.suffix.lower()
    if kind in FORM_ENDINGS:
        write_lists(path, _ranked_lists(table), FORM_ENDINGS[kind], tag)
        return
    with replace_atomically(path) as draft:
        if kind == ".parquet":
            pq.write_table(table, draft)
        elif kind == ".jsonl":
            pl.DataFrame(pl.from_arrow(table)).write_ndjson(draft)
        else:
            with draft.open("w", encoding="utf-8", newline="") as stream:
                rows = (row.values() for batch in table.to_batches() for row in batch.to_pylist())
                write_rows(stream, LIST_SCHEMA.names, rows)


def _ranked_lists(table: pa.Table) -> Iterator[RankingRecord]:
    """Yield the ranked lists in a table of ranked items."""
    for line, (user, rows) in enumerate(groupby(table.to_pylist(), itemgetter("user_id")), start=1):
        ranked = [row for row in rows if row["error"] is None]
        yield RankingRecord(
            request_id=user,
            user_id=user,
            line=line,
            items=tuple(row["item_id"] for row in ranked),
            scores=tuple(row["score"] for row in ranked),
        )


def _parts_folder(to: str) -> Path:
    """Return the folder of parts: next to an output file, or in the working folder for a database."""
    path = Path(f"{LIST_TABLE}-{digest_of(to=to)[:8]}") if "://" in to else Path(to)
    return path.with_name(path.name + ".parts")


def _is_part_file(name: str) -> bool:
    return name == LOCK_FILE or (name.startswith((".part-", "part-")) and ".parquet" in name)
