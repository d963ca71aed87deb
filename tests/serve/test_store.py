"""What a service must remember: the same promises of SQLite and of PostgreSQL, and what each refuses."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from llmrec.errors import LlmrecError, MissingExtra
from llmrec.serve import databases
from llmrec.serve import store as module
from llmrec.serve.store import ServiceStore
from llmrec.types import Item
from tests.facts import Facts, raises
from tests.serve.store_model import HOSTILE, adding, agree, event, killed

_NUMBERS = count()


def items_of(store: ServiceStore, user: str) -> list[str]:
    return [each.item_id for each in store.events_of(user)]


def ask(where: str, query: str) -> list[tuple[Any, ...]]:
    """Run one statement past the store."""
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


# --------------------------------------------------------------------------- events


def test_events_come_back_oldest_first_and_outlive_the_store(where: str) -> None:
    with opened(where) as store:
        given = [event("a", "late", 9.5, 0.1), event("a", "one", 3.0), event("b", "other", 1.0), event("a", "two", 3.0)]
        assert store.add_events(given) == 4 and store.add_events([]) == 0
        assert store.add_events([event("a", "early", -1e300, 5)]) == 1
    with opened(where) as store:
        assert items_of(store, "a") == ["early", "one", "two", "late"]
        assert store.events_of("a")[-1] == given[0] and store.events_of("a")[1].rating is None
        # The last that came, whatever their times.
        assert [each.item_id for each in store.events_of("a", 2)] == ["early", "two"]
        assert store.events_of("a", 0) == [] == store.events_of("nobody")
        assert [each.item_id for each in store.all_events()] == ["late", "one", "other", "two", "early"]


def test_of_many_events_only_those_that_are_asked_for_are_read(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(where) as store:
        store.add_events([event(user, str(n), float(n)) for n in range(500) for user in "ab"])
        database, read, rows = store._database, store._database.read, []
        monkeypatch.setattr(database, "read", lambda *asked: rows.extend(found := read(*asked)) or found)
        assert [each.item_id for each in store.events_of("a", 3)] == ["497", "498", "499"] and len(rows) == 3
    if "://" in where:
        made = "SELECT indexdef FROM pg_indexes WHERE indexname = 'llmrec_events_of' AND schemaname = current_schema()"
        assert "(user_key, seq)" in str(ask(where, made))
    else:
        plan = "EXPLAIN QUERY PLAN SELECT event FROM llmrec_events WHERE user_key = 'x' ORDER BY seq DESC LIMIT 3"
        assert "llmrec_events_of" in str(ask(where, plan)) and "B-TREE" not in str(ask(where, plan))


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_ids_are_data_and_nothing_else(store: ServiceStore, name: str) -> None:
    store.add_events([event(name, name, 1.0), event("bystander", "kept")])
    store.put_items([Item(item_id=name, title=name, fields={name: name, "nul": "\0"})])
    assert store.events_of(name) == [event(name, name, 1.0)]
    assert store.item_changes() == (
        {name: Item(item_id=name, title=name, fields={name: name, "nul": "\0"})},
        frozenset(),
    )
    assert store.remove_items([name]) == 1 and store.item_changes() == ({}, frozenset({name}))
    assert store.erase(name) == 1 and store.erased(name) and not store.erased("bystander")
    assert list(store.all_events()) == [event("bystander", "kept")]


def test_a_refresh_sees_each_event_once_whatever_comes_meanwhile(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 7)
    store.add_events([event("a", str(n)) for n in range(30)])
    seen = []
    for each in store.all_events():
        seen.append(each.item_id)
        if len(seen) == 5:
            store.add_events([event("b", "30")])
    assert seen == [str(n) for n in range(31)]


@pytest.mark.parametrize(
    ("seed", "faults"), [*((n, False) for n in range(3)), pytest.param(4, True, marks=pytest.mark.slow)]
)
def test_two_processes_that_share_a_store_agree_with_a_model(where: str, seed: int, faults: bool) -> None:
    assert agree(where, seed, 80, faults=faults).total() == 80


# --------------------------------------------------------------------------- many at once, and kills


def test_threads_that_add_at_once_lose_nothing(store: ServiceStore) -> None:
    failures: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for k in range(12):
                store.add_events([event(f"u{n}", f"{n}-{k}-{j}", float(k)) for j in range(3)])
                assert len(store.events_of(f"u{n}")) == 3 * (k + 1)
                if n % 3 == 0:
                    store.erase(f"erased{n}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for n in range(12):
        assert items_of(store, f"u{n}") == [f"{n}-{k}-{j}" for k in range(12) for j in range(3)]
    assert len(list(store.all_events())) == 12 * 12 * 3


def test_a_kill_right_after_events_were_added_loses_none(where: str) -> None:
    calls = killed(where, 15)
    with opened(where) as store:
        found = items_of(store, "killed")
    # What was being added may be there, but then as a whole.
    assert len(found) % 3 == 0 and len(found) // 3 in (calls, calls + 1)
    assert found[: 3 * calls] == [f"{n}-{j}" for n in range(calls) for j in range(3)]


def test_processes_that_open_at_once_share_one_store(where: str) -> None:
    with adding(where, "a") as first, adding(where, "b") as second, adding(where, "c") as third:
        assert [each.wait(timeout=120) for each in (first, second, third)] == [0, 0, 0]
    with opened(where) as store:
        assert [len(store.events_of(name)) for name in "abc"] == [63, 63, 63]
    if "://" not in where:
        assert [path.name for path in Path(where).parent.iterdir()] == ["service.db"]


# --------------------------------------------------------------------------- erasure


def test_an_erased_user_is_remembered_as_erased_and_may_begin_anew(where: str) -> None:
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


def test_the_hash_of_an_erased_user_is_of_this_store_alone(where: str, tmp_path: Path) -> None:
    hashes = []
    for place in (where, str(tmp_path / "other.db")):
        with opened(place) as store:
            store.erase("ann")
        hashes.append(ask(place, "SELECT user_key FROM llmrec_erased")[0][0])
    assert hashes[0] != hashes[1] and all("ann" not in each and len(each) == 32 for each in hashes)


def test_no_byte_of_an_erased_user_is_left_in_the_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    # Of all lengths, so that pages fill, empty and spill over: with DELETE bytes of three users stay behind here.
    live = [f"user{n:04d}{'~' * int(10 ** rng.uniform(0, 3.3))}" for n in range(100)]
    gone: list[str] = []
    left: set[str] = set()
    with opened(tmp_path / "s.db") as store:
        for turn in range(90):
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


def test_an_erasure_that_others_hold_up_says_so_and_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOMENT", 0.0)
    file = tmp_path / "s.db"
    with opened(file) as store:
        store.add_events([event("annabel", str(n)) for n in range(50)])
        with reading(file):
            assert store.erase("annabel") == 50
            assert store.unfinished and store.remains == [module.IN_LOG] and held(tmp_path, "annabel")
            assert not store.finish_erasures() and store.unfinished
        assert store.finish_erasures() and not store.unfinished and store.remains == []
        assert held(tmp_path, "annabel") == []


def test_an_erasure_that_was_not_finished_is_finished_when_the_store_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOMENT", 0.0)
    file, stack = tmp_path / "s.db", ExitStack()
    with opened(file) as store:
        store.add_events([event("annabel", str(n)) for n in range(50)])
        stack.enter_context(reading(file))
        store.erase("annabel")
    # As after a kill, the log is there: the last process that leaves only reads.
    assert held(tmp_path, "annabel")
    with opened(file) as store:
        assert store.unfinished
    stack.close()
    with opened(file) as store:
        assert not store.unfinished and held(tmp_path, "annabel") == [] and store.erased("annabel")


def test_what_postgresql_keeps_of_an_erased_user_is_said(postgres: str) -> None:
    with opened(schema(postgres)) as store:
        store.add_events([event("ann")])
        assert store.erase("ann") == 1 and not store.unfinished
        assert len(store.remains) == 1 and "vacuum" in store.remains[0]


# --------------------------------------------------------------------------- items


def test_items_are_put_replaced_removed_and_put_again(where: str) -> None:
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


# --------------------------------------------------------------------------- what is refused


def test_a_closed_store_says_so(store: ServiceStore) -> None:
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
def test_tables_of_another_version_are_refused(where: str, change: str, facts: Facts) -> None:
    with opened(where) as store:
        store.add_events([event("a")])
    ask(where, change)
    with raises(LlmrecError, facts):
        ServiceStore.open(where)
    assert ask(where, "SELECT count(*) FROM llmrec_events") == [(1,)]


def test_a_table_that_is_gone_is_one_error(where: str) -> None:
    with opened(where) as store:
        ask(where, "DROP TABLE llmrec_items")
        with raises(LlmrecError, Facts("wrong-format" if "://" in where else "damaged")):
            store.item_changes()
        assert store.add_events([event("a")]) == 1


def test_what_is_stored_and_damaged_is_one_error(where: str) -> None:
    with opened(where) as store:
        store.put_items([Item(item_id="1", title="Heat", fields={"a": "b"})])
        ask(where, "UPDATE llmrec_items SET fields = '{'")
        with raises(LlmrecError, Facts("damaged", says="'1'")):
            store.item_changes()
        store.add_events([event("a")])
        ask(where, "UPDATE llmrec_events SET event = '[]'")
        with raises(LlmrecError, Facts("damaged")):
            store.events_of("a")


# --------------------------------------------------------------------------- SQLite files


def a_folder(path: Path) -> None:
    path.mkdir()


def a_text(path: Path) -> None:
    path.write_text("user_id,item_id\n" * 50)


def nothing(path: Path) -> None:
    path.touch()


def a_strange_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE orders (n INTEGER)")


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone.db"))


def a_log_alone(path: Path) -> None:
    Path(f"{path}-wal").write_bytes(b"changes")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def cut_short(path: Path) -> None:
    with opened(path) as store:
        store.add_events([event(f"u{n}", "i" * 500) for n in range(200)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(path: Path) -> None:
    with opened(path) as store:
        store.add_events([event(f"u{n}", "i" * 500) for n in range(200)])
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


@pytest.mark.parametrize(
    ("made", "facts"),
    [
        (a_folder, Facts("unreadable", "s.db")),
        (a_text, Facts("wrong-format", "s.db")),
        (nothing, Facts("empty", "s.db")),
        (a_strange_database, Facts("wrong-format", "s.db", says="another program")),
        (a_dangling_link, Facts("unreadable", "s.db")),
        (a_log_alone, Facts("damaged", "s.db", says="s.db-wal")),
        (a_pipe, Facts("unreadable", "s.db")),
        (cut_short, Facts("damaged", "s.db")),
        (overwritten, Facts("damaged", "s.db")),
    ],
)
def test_what_is_no_store_is_left_as_it_is(tmp_path: Path, made: Callable[[Path], None], facts: Facts) -> None:
    made(tmp_path / "s.db")

    def state() -> dict[str, bytes]:
        # The index of a log is made anew whenever a database is opened.
        files = [path for path in tmp_path.iterdir() if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
        return {path.name: path.read_bytes() for path in files}

    before = state()
    with raises(LlmrecError, facts):
        ServiceStore.open(str(tmp_path / "s.db"))
    assert state() == before


@pytest.mark.parametrize("where", ["", "file.txt/s.db", "a\0b"], ids=["empty", "in a file", "nul"])
def test_places_where_no_file_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    with raises(LlmrecError, Facts("unreadable")):
        ServiceStore.open(where)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_what_is_committed_is_on_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path / "s.db"), closing(databases._connect(tmp_path / "s.db")) as raw:
        told = [
            raw.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "secure_delete")
        ]
    assert told == ["wal", 2, 1]


def test_only_its_owner_may_read_a_new_file(tmp_path: Path) -> None:
    with opened(tmp_path / "s.db") as store:
        store.add_events([event("a")])
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


@contextmanager
def an_ordinary_user() -> Iterator[Path]:
    """Hand out a folder, and let root be somebody else meanwhile."""
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


def test_a_file_without_leave_is_one_error() -> None:
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


def test_a_file_that_another_program_holds_is_one_error(tmp_path: Path) -> None:
    with opened(tmp_path / "s.db", wait=0.05) as store, closing(sqlite3.connect(tmp_path / "s.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with raises(LlmrecError, Facts("busy", "s.db")):
            store.add_events([event("a")])
        other.rollback()
        assert store.add_events([event("a")]) == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_moved_away_is_not_written_to(tmp_path: Path, replaced: bool) -> None:
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


def test_a_full_disk_stores_all_of_a_call_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, pages = databases._connect, 12

    def small(path: Path, *more: Any) -> sqlite3.Connection:
        raw = plain(path, *more)
        raw.execute(f"PRAGMA max_page_count={pages}")
        return raw

    monkeypatch.setattr(databases, "_connect", small)
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


# --------------------------------------------------------------------------- servers


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("postgresql://me:secret@127.0.0.1:1/shop", "unreachable"),
        ("postgresql://127.0.0.1:1/shop?user=me&password=secret", "unreachable"),
        ("postgresql://me:127%2E0%2E0%2E1@127.0.0.1:1/shop", "unreachable"),
        ("postgresql://me:x@secret@127.0.0.1:1/shop", "bad-value"),
        ("postgresql://me:1/secret@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:secret/x@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:1#secret@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:1?secret@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:secret%zz@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:secret[@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:secret\u2100@127.0.0.1/shop", "bad-value"),
        ("postgresql://me:secret@127.0.0.1:port/shop", "bad-value"),
        ("mysql://me:secret@host/shop", "unsupported"),
        ("me:secret://host", "unsupported"),
    ],
)
def test_no_password_stands_in_an_error(where: str, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("adbc_driver_postgresql.dbapi")
    with raises(LlmrecError, Facts(kind)) as found:
        ServiceStore.open(where)
    error: BaseException | None = found.value
    while error is not None:
        # What a log of the error would print.
        assert "secret" not in f"{error!r}{error.args}{getattr(error, 'file', '')}{caplog.text}", error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if "%2E" in where:
        assert 'server at "***"' in str(found.value)


def test_several_hosts_and_sockets_are_no_mistake() -> None:
    pytest.importorskip("adbc_driver_postgresql.dbapi")
    for host in ("127.0.0.1:1,127.0.0.1:2", "[::1]:1", "%2Ftmp%2Fnowhere"):
        with raises(LlmrecError, Facts("unreachable")):
            ServiceStore.open(f"postgres://me@{host}/shop")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adbc_driver_postgresql.dbapi", None)
    with raises(MissingExtra, Facts("not-installed", says="llmrec[tables]")):
        ServiceStore.open("postgresql://me:secret@host/shop")


@pytest.mark.parametrize("table", ["llmrec_events (n INT)", "llmrec_service (n INT)"])
def test_tables_of_another_program_are_left_as_they_are(postgres: str, table: str) -> None:
    where = schema(postgres)
    ask(where, f"CREATE TABLE {table}")
    with raises(LlmrecError, Facts("wrong-format", says="another database")):
        ServiceStore.open(where)
    assert ask(where, "SELECT count(*) FROM information_schema.tables WHERE table_schema = current_schema()") == [(1,)]


def test_a_user_without_leave_is_one_error(postgres: str) -> None:
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


def test_a_database_that_is_not_there_is_one_error(postgres: str) -> None:
    with raises(LlmrecError, Facts("unreachable", says="nowhere")):
        ServiceStore.open(postgres.replace("/postgres?", "/nowhere?"))


def test_letters_that_a_database_cannot_keep_are_refused_at_once(postgres: str) -> None:
    ask(postgres, "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    with raises(LlmrecError, Facts("unsupported", says="UTF8")):
        ServiceStore.open(postgres.replace("/postgres?", "/latin?"))


def test_a_server_that_was_started_anew_costs_no_call(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = schema(postgres)
    monkeypatch.setattr(module, "_IDLE", float("inf"))
    others = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = current_database() AND "
    with opened(where) as store:
        store.add_events([event("a")])
        # Without a look at the connection a call fails, but only one.
        ask(where, others + "pid <> pg_backend_pid()")
        with raises(LlmrecError, Facts("unreachable")):
            store.add_events([event("a")])
        assert store.add_events([event("a")]) == 1
        monkeypatch.setattr(module, "_IDLE", 0.0)
        ask(where, others + "pid <> pg_backend_pid()")
        assert store.add_events([event("a")]) == 1 and len(store.events_of("a")) == 3


def test_connections_are_bounded_and_none_waits_inside_a_transaction(postgres: str) -> None:
    where = f"{schema(postgres)}&application_name=bounded"
    with opened(where) as store:
        threads = [threading.Thread(target=store.events_of, args=("a",)) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        query = "SELECT state FROM pg_stat_activity WHERE application_name = 'bounded'"
        states = ask(postgres, query)
        assert 1 <= len(states) <= module._MOST and {state for (state,) in states} == {"idle"}
