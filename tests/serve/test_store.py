"""The store of a service: the same behaviour with SQLite and PostgreSQL, and errors of each."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from llmrec.errors import LlmrecError, MissingExtra
from llmrec.serve import databases
from llmrec.serve import store as module
from llmrec.serve.store import ServiceStore, StoredEvent
from llmrec.types import Item
from tests.facts import Facts, raises

_NUMBERS = count()
HOSTILE = (
    "'; DROP TABLE llmrec_events; --",
    "$1 ?1 %s {0} $$",
    "Zoë 映画 🎬 \u202e\u0301",
    '\\"\n\t[1]',
    "".join(random.Random(0).choices("abcdefghij映画🎬", k=10_000)),
    " ",
    "",
    # The key of deleted interactions must not be the key of a user with this id.
    databases.ERASED_KEY,
)
# Adds events until it is killed, and prints the number of each finished call.
ADDS = """
import sys
from llmrec.serve.store import ServiceStore, StoredEvent
where, name = sys.argv[1:]
store = ServiceStore.open(where)
for n in range(10_000):
    store.add_events([StoredEvent(user_id=name, item_id=f"{n}-{j}", rating=None, timestamp=n) for j in range(3)])
    print(n, flush=True)
    if name != "killed" and n == 20:
        store.close()
        break
"""


def event(user: str, item: str = "i", at: float = 0.0, rating: float | None = None) -> StoredEvent:
    return StoredEvent(user_id=user, item_id=item, rating=rating, timestamp=at)


def adding(where: str, name: str) -> subprocess.Popen[str]:
    """Start a process that adds events of a user; for the user ``killed`` it adds them until it is killed."""
    return subprocess.Popen([sys.executable, "-c", ADDS, where, name], stdout=subprocess.PIPE, text=True)


@contextmanager
def locked(where: str) -> Iterator[None]:
    """Lock the events, as a long write of another program does."""
    if "://" not in where:
        with closing(sqlite3.connect(where, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    from adbc_driver_postgresql import dbapi

    with dbapi.connect(where) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE llmrec_events IN EXCLUSIVE MODE")
        yield
        connection.rollback()


def items_of(store: ServiceStore, user: str) -> list[str]:
    return [each.item_id for each in store.events_of(user)]


def ask(where: str, query: str) -> list[tuple[Any, ...]]:
    """Run one statement directly in the database, without the store."""
    if "://" not in where:
        with closing(sqlite3.connect(where)) as connection, connection:
            return connection.execute(query).fetchall()
    from adbc_driver_postgresql import dbapi

    with dbapi.connect(where, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return list(cursor.fetchall()) if cursor.description else []


def schema(postgres: str) -> str:
    """Make an empty schema, which costs less than a database, and return a URL that leads to it."""
    name = f"shop{next(_NUMBERS)}"
    ask(postgres, f"CREATE SCHEMA {name}")
    return f"{postgres}&options=-csearch_path%3D{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "shop" / "service.db")
    return schema(request.getfixturevalue("postgres"))


@contextmanager
def opened(where: str | Path, **more: Any) -> Iterator[ServiceStore]:
    with closing(ServiceStore.open(str(where), **more)) as store:
        yield store


@pytest.fixture
def store(where: str) -> Iterator[ServiceStore]:
    with opened(where) as store:
        yield store


def test_events_are_sorted_and_survive_a_restart(where: str) -> None:
    with opened(where) as store:
        events = [
            event("a", "late", 9.5, 0.1),
            event("a", "one", 3.0),
            event("b", "other", 1.0),
            event("a", "two", 3.0),
        ]
        assert store.add_events(events) == 4 and store.add_events([]) == 0
        assert store.add_events([event("a", "early", -1e300, 5)]) == 1
    with opened(where) as store:
        assert items_of(store, "a") == ["early", "one", "two", "late"]
        assert store.events_of("a")[-1] == events[0] and store.events_of("a")[1].rating is None
        # The last added, whatever their times.
        assert [each.item_id for each in store.events_of("a", 2)] == ["early", "two"]
        assert store.events_of("a", 0) == [] == store.events_of("unknown")
        assert [each.item_id for each in store.all_events()] == ["late", "one", "other", "two", "early"]


def test_only_requested_events_are_read(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(where) as store:
        store.add_events([event(user, str(n), float(n)) for n in range(500) for user in "ab"])
        database, read, rows = store._database, store._database.read, []
        monkeypatch.setattr(database, "read", lambda *args: rows.extend(result := read(*args)) or result)
        assert [each.item_id for each in store.events_of("a", 3)] == ["497", "498", "499"] and len(rows) == 3
    if "://" in where:
        index = "SELECT indexdef FROM pg_indexes WHERE indexname = 'llmrec_events_of' AND schemaname = current_schema()"
        assert "(user_key, seq)" in str(ask(where, index))
    else:
        plan = "EXPLAIN QUERY PLAN SELECT event FROM llmrec_events WHERE user_key = 'x' ORDER BY seq DESC LIMIT 3"
        assert "llmrec_events_of" in str(ask(where, plan)) and "B-TREE" not in str(ask(where, plan))


def test_hostile_ids_are_plain_data(store: ServiceStore) -> None:
    store.add_events([event("bystander", "kept")])
    for name in HOSTILE:
        store.add_events([event(name, name, 1.0)])
        item = Item(item_id=name, title=name, fields={name: name, "nul": "\0"})
        store.put_items([item])
        assert store.events_of(name) == [event(name, name, 1.0)]
        assert store.item_changes()[0] == {name: item}
        assert store.remove_items([name]) == 1 and store.item_changes()[0] == {}
        assert store.erase(name) == 1 and store.erased(name) and not store.erased("bystander")
    assert store.item_changes() == ({}, frozenset(HOSTILE))
    assert list(store.all_events()) == [event("bystander", "kept")]


def test_all_events_are_read_once_despite_concurrent_writes(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_ROWS", 7)
    store.add_events([event("a", str(n)) for n in range(30)])
    seen = []
    for each in store.all_events():
        seen.append(each.item_id)
        if len(seen) == 5:
            store.add_events([event("b", "30")])
    assert seen == [str(n) for n in range(31)]


def test_two_connections_see_each_other(where: str) -> None:
    alien = Item(item_id="2", title="Alien", fields={"genre": "horror"})
    with opened(where) as one, opened(where) as two:
        one.add_events([event("ann", "1"), event("bob", "2")])
        two.add_events([event("ann", "3", -1.0)])
        assert items_of(one, "ann") == items_of(two, "ann") == ["3", "1"]
        assert two.erase("ann") == 2 and one.erased("ann") and items_of(one, "ann") == []
        assert one.put_items([alien]) == 1 and two.item_changes() == ({"2": alien}, frozenset())
        assert two.remove_items(["2"]) == 1 and one.item_changes() == ({}, frozenset({"2"}))
        assert list(one.all_events()) == list(two.all_events()) == [event("bob", "2")]


def test_locked_store_is_one_error(where: str) -> None:
    # In PostgreSQL this is the timeout of every statement.
    wait = 1.0 if "://" in where else 0.05
    with opened(where) as store:
        store.add_events([event("a", "first")])
    with opened(where, wait=wait) as store:
        with locked(where):
            with raises(LlmrecError, Facts("busy")):
                store.add_events([event("a")])
            assert items_of(store, "a") == ["first"]
        assert store.add_events([event("a", "second")]) == 1 and items_of(store, "a") == ["first", "second"]


def test_concurrent_threads_lose_no_event(store: ServiceStore) -> None:
    def work(n: int) -> None:
        for k in range(6):
            store.add_events([event(f"u{n}", f"{n}-{k}-{j}", float(k)) for j in range(3)])
            assert len(store.events_of(f"u{n}")) == 3 * (k + 1)
            if n % 3 == 0:
                store.erase(f"erased{n}")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))
    for n in range(12):
        assert items_of(store, f"u{n}") == [f"{n}-{k}-{j}" for k in range(6) for j in range(3)]
    assert len(list(store.all_events())) == 12 * 6 * 3


def test_concurrent_processes_and_a_kill_lose_no_event(where: str) -> None:
    with adding(where, "other") as other, adding(where, "killed") as process:
        assert process.stdout is not None
        reported = [int(process.stdout.readline()) for _ in range(15)]
        process.kill()
        # communicate() would lose lines that readline() has buffered.
        reported += [int(line) for line in process.stdout.read().split()]
        assert process.wait(timeout=60) == -signal.SIGKILL and other.wait(timeout=120) == 0
    assert reported == list(range(len(reported)))
    with opened(where) as store:
        items = items_of(store, "killed")
        assert len(store.events_of("other")) == 63
    # The interrupted call is stored completely or not at all.
    assert len(items) % 3 == 0 and len(items) // 3 in (len(reported), len(reported) + 1)
    assert items[: 3 * len(reported)] == [f"{n}-{j}" for n in reported for j in range(3)]
    if "://" not in where:
        assert [path.name for path in Path(where).parent.iterdir()] == ["service.db"]


def test_erased_user_may_come_back(where: str) -> None:
    with opened(where) as store:
        store.add_events([event("ann", "1"), event("bob", "2"), event("ann", "3")])
        assert not store.erased("ann")
        assert store.erase("ann") == 2 and store.events_of("ann") == []
        assert store.erase("ann") == 0 and store.erase("never seen") == 0
        assert store.erased("ann") and store.erased("never seen") and not store.erased("bob")
        store.add_events([event("ann", "4")])
    with opened(where) as store:
        assert items_of(store, "ann") == ["4"] and store.erased("ann")
        assert items_of(store, "bob") == ["2"]


def test_erased_users_are_read_with_one_query(store: ServiceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ann", "gone", "bob"):
        store.erase(name)
    database, read, queries = store._database, store._database.read, []
    monkeypatch.setattr(database, "read", lambda *args: queries.append(args) or read(*args))
    assert store.erased_among(["bob", "carl", "ann"]) == ["bob", "ann"] and len(queries) == 1


def test_hash_of_an_erased_user_is_salted(where: str, tmp_path: Path) -> None:
    hashes = []
    for path in (where, str(tmp_path / "other.db")):
        with opened(path) as store:
            store.erase("ann")
        hashes.append(ask(path, "SELECT user_key FROM llmrec_erased")[0][0])
    assert hashes[0] != hashes[1] and all("ann" not in each and len(each) == 32 for each in hashes)


def test_file_contains_no_erased_user(tmp_path: Path) -> None:
    rng = random.Random(0)
    # Ids of all lengths, so that pages fill, empty and overflow: DELETE alone would leave bytes behind.
    live = [f"user{n:04d}{'~' * int(10 ** rng.uniform(0, 3.3))}" for n in range(100)]
    gone: list[str] = []
    left: set[str] = set()
    with opened(tmp_path / "s.db") as store:
        for turn in range(50):
            few = rng.choices(live, k=20)
            store.add_events([event(name, f"of-{name[:8]}{'x' * rng.randrange(80)}", rng.random()) for name in few])
            gone.append(live.pop(rng.randrange(len(live))))
            store.erase(gone[-1])
            if turn % 10 == 9:
                held = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
                left |= {name[:8] for name in gone if name[:8].encode() in held}
        assert not left and any(name[:8].encode() in held for name in live)
        assert {each.user_id for each in store.all_events()} <= set(live)


def held(folder: Path, name: str) -> list[str]:
    """Return the files of a folder that hold a text."""
    return [path.name for path in sorted(folder.iterdir()) if name.encode() in path.read_bytes()]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read a store as a backup does, and leave its log as it is."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM llmrec_events").fetchone()
        yield


def test_delayed_erasure_is_reported_and_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READER_WAIT_SECONDS", 0.0)
    file = tmp_path / "s.db"
    with opened(file) as store:
        store.add_events([event("annabel", str(n)) for n in range(50)])
        with reading(file):
            assert store.erase("annabel") == 50
            assert store.unfinished and store.remains == [module.IN_LOG_NOTE] and held(tmp_path, "annabel")
            assert not store.finish_erasures() and store.unfinished
        assert store.finish_erasures() and not store.unfinished and store.remains == []
        assert held(tmp_path, "annabel") == []


def test_unfinished_erasure_is_finished_when_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READER_WAIT_SECONDS", 0.0)
    file, stack = tmp_path / "s.db", ExitStack()
    with opened(file) as store:
        store.add_events([event("annabel", str(n)) for n in range(50)])
        stack.enter_context(reading(file))
        store.erase("annabel")
    # The log still exists, as after a kill: the last process to close the store only reads.
    assert held(tmp_path, "annabel")
    with opened(file) as store:
        assert store.unfinished
    stack.close()
    with opened(file) as store:
        assert not store.unfinished and held(tmp_path, "annabel") == [] and store.erased("annabel")


def test_erasure_reports_what_postgresql_keeps(postgres: str) -> None:
    with opened(schema(postgres)) as store:
        store.add_events([event("ann")])
        assert store.erase("ann") == 1 and not store.unfinished
        assert len(store.remains) == 1 and "vacuum" in store.remains[0]


def test_items_are_added_replaced_and_removed(where: str) -> None:
    with opened(where) as store:
        alien = Item(item_id="2", title="Alien", fields={"genre": "horror"})
        assert store.put_items([Item(item_id="1", title="Heat"), alien, Item(item_id="1", title="Heat (1995)")]) == 2
        assert store.remove_items(["2", "of the model", "2"]) == 2 and store.remove_items(["2"]) == 0
        assert store.put_items([]) == 0 == store.remove_items([])
    with opened(where) as store:
        put, removed = store.item_changes()
        assert put == {"1": Item(item_id="1", title="Heat (1995)")} and removed == {"2", "of the model"}
        assert store.put_items([alien]) == 1
        assert store.item_changes()[0]["2"] == alien and store.item_changes()[1] == {"of the model"}


def test_closed_store_is_an_error(store: ServiceStore) -> None:
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [
        lambda: store.add_events([event("a")]),
        lambda: store.events_of("a"),
        lambda: store.erase("a"),
        lambda: next(store.all_events()),
        lambda: store.put_items([]),
    ]
    for call in calls:
        with raises(LlmrecError, Facts("closed")):
            call()


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ("UPDATE llmrec_service SET value = '2' WHERE name = 'version'", Facts("unsupported", says="pip install -U")),
        ("UPDATE llmrec_service SET value = 'x' WHERE name = 'version'", Facts("damaged")),
        ("DELETE FROM llmrec_service WHERE name = 'salt'", Facts("damaged")),
    ],
    ids=["newer", "no version", "no salt"],
)
def test_rejects_tables_of_another_version(where: str, change: str, facts: Facts) -> None:
    with opened(where) as store:
        store.add_events([event("a")])
    ask(where, change)
    with raises(LlmrecError, facts):
        ServiceStore.open(where)
    assert ask(where, "SELECT count(*) FROM llmrec_events") == [(1,)]


def test_missing_table_is_one_error(where: str) -> None:
    with opened(where) as store:
        ask(where, "DROP TABLE llmrec_items")
        with raises(LlmrecError, Facts("wrong-format" if "://" in where else "damaged")):
            store.item_changes()
        assert store.add_events([event("a")]) == 1


def test_damaged_rows_are_one_error(where: str) -> None:
    with opened(where) as store:
        store.put_items([Item(item_id="1", title="Heat", fields={"a": "b"})])
        ask(where, "UPDATE llmrec_items SET fields = '{'")
        with raises(LlmrecError, Facts("damaged", says="'1'")):
            store.item_changes()
        store.add_events([event("a")])
        ask(where, "UPDATE llmrec_events SET event = '[]'")
        with raises(LlmrecError, Facts("damaged")):
            store.events_of("a")


def a_strange_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE orders (n INTEGER)")


def filled(path: Path) -> bytes:
    with opened(path) as store:
        store.add_events([event(f"u{n}", "i" * 500) for n in range(200)])
    return path.read_bytes()


def cut_short(path: Path) -> None:
    content = filled(path)
    path.write_bytes(content[: len(content) // 2])


def overwritten(path: Path) -> None:
    content = filled(path)
    path.write_bytes(content[:4096] + os.urandom(len(content) - 4096))


@pytest.mark.parametrize(
    ("create", "facts"),
    [
        (Path.mkdir, Facts("unreadable", "s.db")),
        (lambda path: path.write_text("user_id,item_id\n" * 50), Facts("wrong-format", "s.db")),
        (Path.touch, Facts("empty", "s.db")),
        (a_strange_database, Facts("wrong-format", "s.db", says="another program")),
        (lambda path: path.symlink_to(path.with_name("gone.db")), Facts("unreadable", "s.db")),
        (lambda path: Path(f"{path}-wal").write_bytes(b"changes"), Facts("damaged", "s.db", says="s.db-wal")),
        (os.mkfifo, Facts("unreadable", "s.db")),
        (cut_short, Facts("damaged", "s.db")),
        (overwritten, Facts("damaged", "s.db")),
    ],
)
def test_other_files_are_rejected_unchanged(tmp_path: Path, create: Callable[[Path], object], facts: Facts) -> None:
    create(tmp_path / "s.db")

    def state() -> dict[str, bytes]:
        # Opening a database writes the index of its log.
        files = [path for path in tmp_path.iterdir() if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
        return {path.name: path.read_bytes() for path in files}

    before = state()
    with raises(LlmrecError, facts):
        ServiceStore.open(str(tmp_path / "s.db"))
    assert state() == before


@pytest.mark.parametrize("where", ["", "file.txt/s.db", "a\0b"], ids=["empty", "file as folder", "nul"])
def test_rejects_impossible_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    with raises(LlmrecError, Facts("unreadable")):
        ServiceStore.open(where)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_commits_are_durable(tmp_path: Path) -> None:
    with opened(tmp_path / "s.db"), closing(databases._connect_sqlite(tmp_path / "s.db")) as raw:
        names = ("journal_mode", "synchronous", "secure_delete")
        assert [raw.execute(f"PRAGMA {name}").fetchone()[0] for name in names] == ["wal", 2, 1]


def test_new_file_is_private(tmp_path: Path) -> None:
    with opened(tmp_path / "s.db") as store:
        store.add_events([event("a")])
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


@contextmanager
def an_ordinary_user() -> Iterator[Path]:
    """Yield a folder, and give up root's permissions meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        root = os.geteuid() == 0
        if root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield folder
        finally:
            folder.chmod(0o755)
            if root:
                os.seteuid(0)


def test_file_without_permission_is_one_error() -> None:
    with an_ordinary_user() as folder:
        with opened(folder / "s.db"):
            pass
        (folder / "s.db").chmod(0o000)
        with raises(LlmrecError, Facts("unreadable", "s.db", says="permission")):
            ServiceStore.open(str(folder / "s.db"))
        (folder / "s.db").chmod(0o400)
        with raises(LlmrecError, Facts("unreadable", "s.db")), opened(folder / "s.db") as store:
            store.add_events([event("a")])
        folder.chmod(0o555)
        with raises(LlmrecError, Facts("unreadable", "t.db", says="permission")):
            ServiceStore.open(str(folder / "t.db"))


@pytest.mark.parametrize("replaced", [False, True])
def test_moved_file_is_not_written(tmp_path: Path, replaced: bool) -> None:
    file, away = tmp_path / "s.db", tmp_path / "away.db"
    with opened(file) as store:
        store.add_events([event("a")])
        file.rename(away)
        if replaced:
            file.write_bytes(away.read_bytes())
        for call in (lambda: store.add_events([event("a")]), lambda: store.events_of("a"), lambda: store.erase("a")):
            with raises(LlmrecError, Facts("unreadable", "s.db", says="moved or replaced")):
                call()
        away.rename(file)
        assert store.add_events([event("a")]) == 1 and len(store.events_of("a")) == 2


def test_full_disk_stores_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, pages = databases._connect_sqlite, 12

    def small(path: Path, *more: Any) -> sqlite3.Connection:
        raw = plain(path, *more)
        raw.execute(f"PRAGMA max_page_count={pages}")
        return raw

    monkeypatch.setattr(databases, "_connect_sqlite", small)
    with opened(tmp_path / "s.db") as store:
        assert store.add_events([event("a", "first")]) == 1
        with raises(LlmrecError, Facts("exhausted", "s.db", says="free disk space")):
            store.add_events([event("a", f"{n}" * 500) for n in range(100)])
        pages = 1000
        assert items_of(store, "a") == ["first"]
        assert store.add_events([event("a", f"{n}" * 500) for n in range(100)]) == 100
    pages = 4
    with raises(LlmrecError, Facts("exhausted", "t.db")):
        ServiceStore.open(str(tmp_path / "t.db"))
    assert [path.name for path in tmp_path.iterdir()] == ["s.db"]


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("postgresql://me:secret@127.0.0.1:1/shop", "unreachable"),
        ("postgresql://127.0.0.1:1/shop?user=me&password=secret", "unreachable"),
        ("postgresql://me:127%2E0%2E0%2E1@127.0.0.1:1/shop", "unreachable"),
        ("postgresql://me:x@secret@127.0.0.1:1/shop", "bad-value"),
        ("postgresql://me:1/secret@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:1#secret@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:secret%zz@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:secret[@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:secret\u2100@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:secret@127.0.0.1:port/shop", "bad-value"),
        ("mysql://me:secret@host/shop", "unsupported"),
        ("me:secret://host", "unsupported"),
    ],
)
def test_errors_contain_no_password(where: str, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("adbc_driver_postgresql.dbapi")
    with raises(LlmrecError, Facts(kind)) as caught:
        ServiceStore.open(where)
    error: BaseException | None = caught.value
    while error is not None:
        # Everything that a log would contain.
        assert "secret" not in f"{error!r}{error.args}{getattr(error, 'file', '')}{caplog.text}", error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if "%2E" in where:
        assert 'server at "***"' in str(caught.value)


def test_accepts_several_hosts_and_sockets() -> None:
    pytest.importorskip("adbc_driver_postgresql.dbapi")
    for host in ("127.0.0.1:1,127.0.0.1:2", "[::1]:1", "%2Ftmp%2Fnowhere"):
        with raises(LlmrecError, Facts("unreachable")):
            ServiceStore.open(f"postgres://me@{host}/shop")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adbc_driver_postgresql.dbapi", None)
    with raises(MissingExtra, Facts("not-installed", says="llmrec[tables]")):
        ServiceStore.open("postgresql://me:secret@host/shop")


@pytest.mark.parametrize("table", ["llmrec_events (n INT)", "llmrec_service (n INT)"])
def test_rejects_tables_of_another_program(postgres: str, table: str) -> None:
    where = schema(postgres)
    ask(where, f"CREATE TABLE {table}")
    with raises(LlmrecError, Facts("wrong-format", says="another database")):
        ServiceStore.open(where)
    assert ask(where, "SELECT count(*) FROM information_schema.tables WHERE table_schema = current_schema()") == [(1,)]


def test_user_without_permission_is_one_error(postgres: str) -> None:
    where = schema(postgres)
    ask(where, "CREATE ROLE reader LOGIN")
    as_reader, only_read = where.replace("postgres:@", "reader@"), f"{where}%20-cdefault_transaction_read_only%3Don"
    for refused in (as_reader, only_read):
        with raises(LlmrecError, Facts("unreadable", says="grant")):
            ServiceStore.open(refused)
    with opened(where) as store:
        store.add_events([event("a")])
    ask(where, f"GRANT USAGE ON SCHEMA {where.rpartition('%3D')[2]} TO reader")
    for refused in (as_reader, only_read):
        with raises(LlmrecError, Facts("unreadable", says="grant")), opened(refused) as store:
            store.add_events([event("a")])


def test_missing_database_is_one_error(postgres: str) -> None:
    with raises(LlmrecError, Facts("unreachable", says="nowhere")):
        ServiceStore.open(postgres.replace("/postgres?", "/nowhere?"))


def test_rejects_database_without_utf8(postgres: str) -> None:
    ask(postgres, "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    with raises(LlmrecError, Facts("unsupported", says="UTF8")):
        ServiceStore.open(postgres.replace("/postgres?", "/latin?"))


def test_reconnects_after_a_server_restart(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = schema(postgres)
    monkeypatch.setattr(module, "_IDLE_SECONDS", float("inf"))
    others = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = current_database() AND "
    with opened(where) as store:
        store.add_events([event("a")])
        # Without a check of the connection a call fails, but only one.
        ask(where, others + "pid <> pg_backend_pid()")
        with raises(LlmrecError, Facts("unreachable")):
            store.add_events([event("a")])
        assert store.add_events([event("a")]) == 1
        monkeypatch.setattr(module, "_IDLE_SECONDS", 0.0)
        ask(where, others + "pid <> pg_backend_pid()")
        assert store.add_events([event("a")]) == 1 and len(store.events_of("a")) == 3


def test_connections_are_bounded_and_idle(postgres: str) -> None:
    where = f"{schema(postgres)}&application_name=bounded"
    with opened(where) as store:
        with ThreadPoolExecutor(30) as pool:
            list(pool.map(store.events_of, ["a"] * 30))
        query = "SELECT state FROM pg_stat_activity WHERE application_name = 'bounded'"
        states = ask(postgres, query)
        assert 1 <= len(states) <= module._MAX_CONNECTIONS and {state for (state,) in states} == {"idle"}
