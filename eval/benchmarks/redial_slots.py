"""Slot filling by `llmrec.chat.reading` in users' turns of 77 dialogues of IARD, compared with gold annotations.

IARD (Cai and Chen, UMAP 2020) annotates dialogues of ReDial. Used by `eval.benchmarks.redial`.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrec.chat.facts import Facts
from llmrec.chat.reading import Reader
from llmrec.chat.state import ITEM, State
from llmrec.index.titles import title_key
from llmrec.types import Item

SLOTS = {"genres": "GENRE", ITEM: "TITLE", "cast": "ACTOR", "year": "YEAR"}
PLACE = re.compile(r"\s*\([^()]*\)\s*$")
"""Suffixes that distinguish equal titles."""


def lines(path: Path) -> list[dict[str, Any]]:
    """Read a compressed file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def slots(folder: Path, items: Sequence[Item]) -> tuple[list[dict[str, Any]], int]:
    """Return precision and recall of the rules in users' turns, by slot, and the number of turns."""
    reader = Reader(Facts({item.item_id: item for item in items}))
    titles = {item.item_id: item.title for item in items}
    right: Counter[str] = Counter()
    read: Counter[str] = Counter()
    gold: Counter[str] = Counter()
    turns = 0
    for dialogue in lines(folder / "convrec" / "iard_gold.jsonl.gz"):
        for turn in dialogue["turns"]:
            if turn["speaker"] != "user":
                continue
            turns += 1
            heard = reader.read(turn["text"], State(turn=1))
            said = [(slot, value) for act in turn["acts"] for slot, value in act["slots"] if value]
            wanted = Counter({(slot, _plain(slot, value, reader)) for slot, value in said})
            got = Counter(
                {
                    (SLOTS[wish.field], _plain(SLOTS[wish.field], titles.get(wish.value, wish.value), reader))
                    for wish in heard.wishes
                    if wish.field in SLOTS and wish.op != "until"
                }
            )
            right.update(slot for slot, _ in wanted & got)
            read.update(slot for slot, _ in got)
            gold.update(slot for slot, _ in wanted)
    rows = [_slot(name, right[name], read[name], gold[name]) for name in sorted(gold, key=lambda name: -gold[name])]
    closed = [name for name in gold if name in SLOTS.values()]
    for name, among in (("all with closed lists", closed), ("all", list(gold))):
        rows.append(_slot(name, *(sum(counts[each] for each in among) for counts in (right, read, gold))))
    return rows, turns


def _slot(name: str, right: int, read: int, gold: int) -> dict[str, Any]:
    precision, recall = right / max(1, read), right / max(1, gold)
    both = 2 * precision * recall / max(1e-12, precision + recall)
    return {
        "slot": name,
        "gold": gold,
        "read": read,
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "f1": round(both, 4),
    }


def _plain(slot: str, value: str, reader: Reader) -> str:
    """Normalise a value for comparison: a genre as in the catalogue, a title without a distinguishing suffix."""
    if slot == "YEAR":
        # A decade and its first year are equal.
        digits = re.sub(r"\D", "", value)[-2:]
        return digits
    key = title_key(PLACE.sub("", value))
    return reader.canonical(key) if slot == "GENRE" else key
