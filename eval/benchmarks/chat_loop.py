"""Conversations with simulated users of MovieLens-100K: how soon a list holds the film that the user wants.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.chat_loop eval/results/chat_loop.json`` draws users of the quickstart's
split by a hash (``--users 200``). Each wants a film of the test part, and knows its genres and year and, from
FOLDER/movie_facts (HetRec 2011), its director and country; the simulator never has the title (`llmrec.chat.simulator`).
Conversations begin with the films of the training part that the user liked, for every manager alike.

- ``random``: any legal call of a tool, whatever was said. ``history``: the next five films of the recommender.
- ``rules``: what was said is read by rules, which choose the tools.
- ``rules, genres and year``: the same, with users who know no director and no country: those nearly name a film.
- ``model``: SmolLM2-135M-Instruct chooses the tools under the token tree of legal calls; rules read what is wanted. It
  takes seconds a turn, so it is run on ``--model-users`` of the users, and ``rules, same users`` stands beside it.

Hit@5 within k turns is the share of conversations one of whose first k lists, of five films each, held the film. The
recommender is ItemKNN over the training part, as the recipe has it. Intervals and differences resample users.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks.clustered import differences
from eval.benchmarks.kar import table
from llmrec.answering.checks import decided
from llmrec.answering.known import Catalogue
from llmrec.answering.opening import Models, open_classics
from llmrec.answering.options import RecommenderOptions
from llmrec.answering.recommender import Recommender
from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.managers import HistoryManager, Manager, ModelManager, RandomManager, RuleManager
from llmrec.chat.reading import Reader, title_of
from llmrec.chat.simulator import Held, SimulatedUser, hold, near, told_of
from llmrec.chat.state import ITEM, State, Wish
from llmrec.chat.tools import ModelLists, Tools, asking
from llmrec.data.hashing import hash64
from llmrec.durable import write_json
from llmrec.index.titles import title_key
from llmrec.machine import machine, versions
from llmrec.metrics.stats import interval
from llmrec.recipe.load import load_recipe
from llmrec.types import Item

RECIPE, MODEL = "recipes/quickstart.yaml", "SmolLM2-135M-Instruct"
TURNS = 5
# Films of a history that a conversation begins with, the last ones.
_PAST = 40
_LIKED = 4.0


KNOWN = ("genres", "year")
"""Of users who know little."""


@dataclass(frozen=True)
class One:
    """A conversation: whose, what was wanted, and how it was held."""

    user: str
    target: str
    held: Held


def informed(items: Mapping[str, Item], folder: Path) -> dict[str, Item]:
    """Return items with directors and countries, by titles and years that both tables have."""
    known = {}
    for row in table(folder / "movie_facts" / "hetrec_facts.tsv.gz").iter_rows(named=True):
        known[title_key(title_of(row["title"] or "")), str(row["year"])] = row
    found = {}
    for name, item in items.items():
        row = known.get((title_key(title_of(item.title)), item.fields.get("year", "")))
        more = (
            {}
            if row is None
            else {"director": str(row["directors"] or "").replace("|", ", "), "country": str(row["country"] or "")}
        )
        found[name] = replace(item, fields={**item.fields, **{key: value for key, value in more.items() if value}})
    return found


def drawn(models: Models, users: int, seed: int) -> list[tuple[str, str, State, list[str]]]:
    """Draw users, each with a film of the test part, the state that a conversation begins with, and liked films."""
    assert models.data is not None
    test = models.data.test.select("user_id", "item_id").rows()
    order = np.argsort(hash64("chat", seed, [user for user, _ in test]), kind="stable")[:users]
    chosen = {test[place][0]: str(test[place][1]) for place in order.tolist()}
    past: dict[str, list[tuple[str, float]]] = {user: [] for user in chosen}
    for user, item, rating in models.data.train.select("user_id", "item_id", "rating").iter_rows():
        if user in past:
            past[user].append((str(item), float(rating or 0)))
    found = []
    for user, target in chosen.items():
        last = past[user][-_PAST:]
        wishes = [
            Wish(field=ITEM, op="is" if rating >= _LIKED else "seen", value=item, hard=False) for item, rating in last
        ]
        # All else that was rated is known already, too, as for a logged-in user.
        seen = tuple(item for item, _ in past[user][:-_PAST])
        liked = [item for item, rating in last if rating >= _LIKED]
        found.append((user, target, State(profile=tuple(wishes), past=seen[-900:]), liked))
    return found


def conversations(who: Mapping[str, tuple[Manager, bool]], models: Models, facts: Facts) -> dict[str, Conversation]:
    """Return a conversation for each manager, with the reader only where it hears."""
    lists = ModelLists(Catalogue(facts.items), asking(models))
    tools, reader = Tools(facts, lists), Reader(facts)
    return {name: Conversation(tools, manager, reader if hears else None) for name, (manager, hears) in who.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Hold the conversations, and write what came out."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.chat_loop")
    parser.add_argument("target", type=Path)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model-users", type=int, default=0)
    given = parser.parse_args(arguments)
    begin = time.perf_counter()
    models = open_classics(load_recipe(RECIPE), ["item-knn"])
    facts = Facts(informed(models.items, Path(os.environ.get("LLMREC_DATA", "."))))
    held: dict[str, list[One]] = {}
    for seed in range(given.seeds):
        managers: dict[str, tuple[Manager, bool]] = {
            "random": (RandomManager(seed), False),
            "history": (HistoryManager(), False),
            "rules": (RuleManager(), True),
        }
        users = drawn(models, given.users, seed)
        for name, conversation in conversations(managers, models, facts).items():
            held.setdefault(name, []).extend(talks(conversation, users, facts, seed))
            if name == "rules":
                poor = talks(conversation, users, facts, seed, KNOWN)
                held.setdefault("rules, genres and year", []).extend(poor)
            sys.stderr.write(f"seed {seed}: {name} done\n")
    if given.model_users:
        users = drawn(models, given.model_users, 0)
        asked = RecommenderOptions(model=MODEL, backend="hf")
        with Recommender.open(decided(asked), ranks=False) as model, model.asked("search") as backend:
            both: dict[str, tuple[Manager, bool]] = {
                "rules, same users": (RuleManager(), True),
                "model": (ModelManager(backend), True),
            }
            for name, conversation in conversations(both, models, facts).items():
                held[name] = talks(conversation, users, facts, 0)
    titles = facts.titles
    every = [one for each in held.values() for one in each]
    leaks = sum(near(line, title_of(titles[one.target])) for one in every for line in one.held.lines)
    write_json(
        given.target,
        {
            "command": f"LLMREC_DATA=FOLDER make bench-chat ARGS='--users {given.users} --seeds {given.seeds}"
            f"{f' --model-users {given.model_users}' if given.model_users else ''}'",
            "recipe": RECIPE,
            "users": given.users,
            "seeds": list(range(given.seeds)),
            "items": len(facts.items),
            "items_with_a_director": sum("director" in item.fields for item in facts.items.values()),
            "rows": [row_of(name, each, titles) for name, each in held.items()],
            "pairs": planned(held),
            "lines_with_a_wanted_title": leaks,
            "seconds": round(time.perf_counter() - begin, 1),
            "machine": machine(),
            "versions": versions(),
        },
    )


def talks(
    conversation: Conversation,
    users: Sequence[tuple[str, str, State, list[str]]],
    facts: Facts,
    seed: int,
    fields: Sequence[str] = (),
) -> list[One]:
    """Return the conversations of some users, `drawn`; ``fields``: all that they know, if any are named."""
    found = []
    for number, (name, target, state, liked) in enumerate(users):
        wanted = told_of(facts, target, liked, seed * 1000 + number)
        if fields:
            known = {field: values for field, values in wanted.attributes.items() if field in fields}
            rejected = tuple(each for each in wanted.unwanted if each[0] in fields)
            wanted = replace(wanted, attributes=known, unwanted=rejected)
        user = SimulatedUser(wanted, facts.numeric, seed * 1000 + number)
        found.append(One(name, target, hold(conversation, user, target, TURNS, state)))
    return found


def within(each: Sequence[One], turns: int) -> NDArray[np.float64]:
    """Return whether the film was in one of the first lists, shape (conversations,)."""
    return np.array([float(one.held.hit is not None and one.held.hit <= turns) for one in each])


def row_of(name: str, each: Sequence[One], titles: Mapping[str, str]) -> dict[str, Any]:
    """Return one row of the table."""
    held, users = [one.held for one in each], [one.user for one in each]
    turns = sum(len(one.lines) for one in held)
    row: dict[str, Any] = {"row": name, "conversations": len(each), "users": len(set(users))}
    for k in range(1, TURNS + 1):
        found = interval(within(each, k), resamples=2000, seed=0, users=users)
        row[f"Hit@5-in-{k}"] = {key: round(value, 4) for key, value in asdict(found).items()}
    hits = [one.hit for one in held if one.hit is not None]
    row |= {
        "turns_to_a_hit": round(float(np.mean(hits)), 2) if hits else None,
        "milliseconds_a_turn": round(1000 * sum(one.seconds for one in held) / turns, 1),
        "tokens_a_turn": round(sum(one.cost.prompt_tokens + one.cost.completion_tokens for one in held) / turns, 1),
        "shown_outside_the_catalogue": sum(item not in titles for one in held for item in one.shown),
        "calls": dict(sorted(Counter(tool for one in held for tool in one.tools).items())),
    }
    text = "  ".join(f"{k}: {row[f'Hit@5-in-{k}']['value']:.3f}" for k in range(1, TURNS + 1))
    sys.stdout.write(f"{name:20} {text}  {row['milliseconds_a_turn']} ms\n")
    return row


def planned(held: Mapping[str, Sequence[One]]) -> list[dict[str, Any]]:
    """Return the planned differences of Hit@5 within five turns, tested as one family."""
    pairs = [
        ("rules", "history"),
        ("rules", "random"),
        ("rules, genres and year", "history"),
        ("model", "rules, same users"),
    ]
    gains = [
        (one, other, within(held[one], TURNS) - within(held[other], TURNS), [each.user for each in held[one]])
        for one, other in pairs
        if one in held and other in held
    ]
    return differences(f"Hit@5-in-{TURNS}", gains)


if __name__ == "__main__":
    main()
