"""Cases of faults follow from their seed, their table from the committed result; what was tried of them has held."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from llmrec.resources import resource

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(resource("eval/results/faults.json").read_text(encoding="utf-8"))
    return content


def test_what_is_planned_has_names_of_its_own_and_follows_from_the_seed() -> None:
    from eval.benchmarks.faults import damage, places, stops

    makers = (stops.kills, stops.full, stops.two, damage.damage, places.links, places.readonly)
    cases = [case for make in makers for case in make(0)]
    assert len({(case.part, case.name) for case in cases}) == len(cases)
    assert [(case.name, case.made) for make in makers for case in make(0)] == [(case.name, case.made) for case in cases]
    counted = Counter(case.part for case in cases)
    assert stops.CHAIN * counted["kills"] == 100 and counted["full disk"] == 5 * 5
    kinds = Counter(case.tags["of"] for case in cases if case.part == "damage")
    assert set(kinds.values()) == {20} and {"stored answers", "feature stores", "kept fits", "checkpoints"} <= set(
        kinds
    )


def test_nothing_that_was_tried_is_lost_or_silently_another(found: dict[str, Any]) -> None:
    assert found["wrong"] == [] and found["all"]["tried"] == found["all"]["held"] > 100
    assert "silent" not in found["all"]
    for part in found["parts"].values():
        assert part["tried"] == sum(own["tried"] for own in part["of"].values())
        assert 0 < part["tried"] <= part["planned"]
