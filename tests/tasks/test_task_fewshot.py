from __future__ import annotations

from dataclasses import replace

import pytest

from llmrec.tasks.fewshot import ShotPool
from llmrec.types import Event, Request


def events(*items: str) -> tuple[Event, ...]:
    return tuple(Event(item_id=item) for item in items)


POOL = {
    "near": events("a", "b", "c", "x"),
    "half": events("a", "b", "p", "q", "r"),
    "far": events("s", "t", "u"),
    "short": events("a"),
    "me": events("a", "b", "c", "d", "e", "f"),
}


def pool(choice: str, least: int = 2) -> ShotPool:
    return ShotPool("sequential", POOL, seed=0, choice=choice, least=least)


def ask(items: str = "abc", user: str = "me") -> tuple[Request, tuple[Event, ...]]:
    past = events(*items)
    return Request(id=f"{user}|z", user_id=user, history=past), past


def test_no_shots_show_the_latest_history() -> None:
    drawn = pool("own").draw(*ask("abcdef"), 0, 3)
    assert drawn.windows == () and drawn.history == events("d", "e", "f")


def test_similar_takes_the_largest_overlap_first() -> None:
    drawn = pool("similar").draw(*ask(), 2, 4)
    assert [window.user_id for window in drawn.windows] == ["near", "half"]
    # Jaccard: near 3/4, half 2/6; far shares nothing, so a third one is drawn at random from the rest.
    third = pool("similar").draw(*ask(), 3, 4)
    assert [window.user_id for window in third.windows] == ["near", "half", "far"]


def test_similar_without_overlap_falls_back_to_random() -> None:
    drawn = pool("similar").draw(*ask("zzz", user="new"), 3, 4)
    assert len({window.user_id for window in drawn.windows}) == 3


def test_own_cuts_earlier_windows_off_the_history() -> None:
    drawn = pool("own").draw(*ask("abcdef"), 1, 4)
    (window,) = drawn.windows
    assert window.user_id == "me"
    assert window.events == events("a", "b", "c") and drawn.history == events("d", "e", "f")


def test_own_never_solves_an_event_outside_training() -> None:
    request, past = ask("abcdefVW")
    drawn = pool("own").draw(request, past, 2, 4)
    own = [window for window in drawn.windows if window.user_id == "me"]
    assert own and not {"V", "W"} & {event.item_id for window in own for event in window.events}
    stranger = pool("own").draw(replace(request, user_id="new"), past, 2, 4)
    assert all(window.user_id != "new" for window in stranger.windows) and stranger.history == past[-4:]


@pytest.mark.parametrize("choice", ["random", "own", "similar"])
@pytest.mark.parametrize("shots", [1, 2, 3])
@pytest.mark.parametrize("length", range(0, 7))
def test_every_choice_gives_as_many_shots_as_asked(choice: str, shots: int, length: int) -> None:
    drawn = pool(choice).draw(*ask("abcdef"[:length]), shots, 4)
    assert len(drawn.windows) == shots
    assert all(2 <= len(window.events) <= 3 for window in drawn.windows)
    assert len(drawn.history) <= 4
    others = [window.user_id for window in drawn.windows if window.user_id != "me"]
    assert len(set(others)) == len(others)
    assert "short" not in others
    assert all(len(window.events) == 3 for window in drawn.windows if window.user_id != "me")
