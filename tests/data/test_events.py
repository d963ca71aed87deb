"""Events by user from columns."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data import events as module
from llmrec.data.dataset import SCHEMA
from llmrec.data.events import Events
from llmrec.tasks.base import UserHistories, rated_events
from llmrec.types import Event
from tests.tasks.task_data import make_split

Rows = list[tuple[str, str, float | None, float | None, str | None]]
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "ü", "c c"]),
        st.sampled_from(["x", "y", "z", ""]),
        st.one_of(st.none(), st.floats(-5, 5)),
        st.one_of(st.none(), st.integers(0, 9).map(float)),
        st.one_of(st.none(), st.sampled_from(["", "good", "bad"])),
    ),
    max_size=20,
)


def naive(rows: Rows, user: str) -> tuple[Event, ...]:
    return tuple(Event(item_id=i, rating=r, timestamp=t, text=x) for u, i, r, t, x in rows if u == user)


@given(ROWS)
def test_events_equal_the_rows_of_each_user(rows: Rows) -> None:
    events = Events(pl.DataFrame(rows, schema=dict(SCHEMA), orient="row"))
    for _ in range(2):
        for user in ("a", "b", "ü", "c c", "unknown"):
            assert events.of(user) == naive(rows, user)


def test_cache_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHE_SIZE", 12)
    rows: Rows = [(f"u{n % 7}", f"i{n}", float(n), None, None) for n in range(40)]
    events = Events(pl.DataFrame(rows, schema=dict(SCHEMA), orient="row"))
    for turn in range(30):
        user = f"u{turn * 5 % 7}"
        assert events.of(user) == naive(rows, user)
        assert events._cached == sum(map(len, events._cache.values())) <= 12
    assert len(events._cache) == 2


def test_pasts_are_training_events() -> None:
    data = make_split()
    every = {user: data.train_events(user) for user in data.users()}
    assert dict(UserHistories(data, least=6)) == {user: past for user, past in every.items() if len(past) >= 6}
    some = UserHistories(data, lambda _, events: rated_events(events)[::2])
    assert dict(some) == {user: past[::2] for user, past in every.items() if past}
    assert dict(some.sizes()) == {user: len(past) for user, past in some.items()}
    assert "unknown" not in some and some.get("unknown") is None
    with pytest.raises(KeyError):
        some["unknown"]
