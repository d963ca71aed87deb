"""Checks for test leakage in splits, profiles, candidates, training examples, prompts, baselines and item indexes.

A check reads the data of the run (drawn sets, stored answers) and returns its result; it repairs nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count as numbers
from itertools import islice, zip_longest
from typing import Any, Literal

import numpy as np
import polars as pl
from scipy.special import chdtrc

from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.parameters import create_baseline, feature_store_hashes
from llmrec.data.candidates import interacted_items
from llmrec.data.described import MIN_TITLE_LENGTH
from llmrec.data.features import FeatureStore, Pair
from llmrec.data.split import SplitDataset, count_holdouts_before_training, request_id
from llmrec.ensembles.cells import CandidateScores
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.members import PrecomputedMember, baseline_score_scale, restore_answers, restore_weights
from llmrec.ensembles.rankers import ListEnsemble, ListMember
from llmrec.guard import break_item_tokens, clean
from llmrec.index.table import ItemIndex
from llmrec.index.titles import display_title
from llmrec.metrics.stats import mean_ranks
from llmrec.pipeline.indexing import build_index
from llmrec.pipeline.row_specs import is_arm_evaluated
from llmrec.pipeline.study import Study, build_task, leak_warning, leaking_users, profile_leaks
from llmrec.prompts.template import Template
from llmrec.recipe.schema import BaselineSection
from llmrec.registry import is_positional
from llmrec.results import Row
from llmrec.tasks.direct import asks_for
from llmrec.tasks.family import Family, families, family_of
from llmrec.tasks.pool import training_examples
from llmrec.tasks.task import BranchingTask, Task, Want
from llmrec.train.reward.rewards import training_question
from llmrec.types import Case, Example, Message, Prompt, Request, Segment

_MAX_EXAMPLES = 5
# False positive rate of one statistical check.
_FALSE_POSITIVE_RATE = 1e-4
_BASELINE_REQUESTS = 50


@dataclass(frozen=True)
class Check:
    """The result of one check of the audit.

    Attributes:
        name: The subject of the check.
        found: The result, in one sentence.
        verdict: ``leak`` fails the run; ``notice`` is for readers of the report.
        examples: The first findings.
        figures: The numbers behind the sentence.
    """

    name: str
    found: str
    verdict: Literal["clean", "leak", "notice"] = "clean"
    examples: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


def verdict(name: str, looked_at: str, findings: Sequence[str]) -> Check:
    """Return the result of a check: a leak if ``findings`` is not empty, otherwise clean."""
    if not findings:
        return Check(name, f"none in {looked_at}")
    return Check(name, f"{len(findings)} in {looked_at}", "leak", tuple(findings[:_MAX_EXAMPLES]))


# --------------------------------------------------------------------------- the split and the users


def audit_training_interactions(data: SplitDataset) -> Check:
    """Check that no training interaction is held out, follows its user's held-out one, or has a cold-start item."""
    train = data.train.select("user_id", "item_id", "timestamp")
    findings = [
        f"user {user}, item {item}: held out, but in the training data"
        for user, item in train.select("user_id", "item_id").iter_rows()
        if (user, item) in data.held_out
    ]
    findings += [
        f"cold-start item {item}: an interaction of user {user} is used in training or shown"
        for frame in (data.train, data.known)
        for user, item in frame.select("user_id", "item_id").iter_rows()
        if item in data.cold
    ]
    if data.cold:
        both = set(data.valid["user_id"]) & set(data.test["user_id"])
        findings += [
            f"user {user}: evaluated in both splits, so the test history contains cold-start items"
            for user in sorted(both)
        ]
    if data.kind in ("leave_one_out", "last_share", "last_basket", "cold_items") and data.dataset.has_time:
        first = pl.concat([data.valid, data.test]).group_by("user_id").agg(pl.col("timestamp").min().alias("held"))
        late = train.join(first, on="user_id").filter(pl.col("timestamp") > pl.col("held"))
        findings += [
            f"user {user}, item {item}: in the training data, but later than a held-out interaction of this user"
            for user, item in late.select("user_id", "item_id").iter_rows()
        ]
    name, looked = f"training interactions of {data.dataset.name}", f"{len(train):,} interactions"
    if (
        not findings
        and data.kind == "given"
        and (early := count_holdouts_before_training(data.train, pl.concat([data.valid, data.test])))
    ):
        result = (
            f"none is held out, but {early:,} held-out interactions are earlier than a training interaction of their "
            "user"
        )
        return Check(name, f"{result}, so histories contain later interactions", "notice", figures={"earlier": early})
    return verdict(name, looked, findings)


def audit_profiles(data: SplitDataset) -> Check:
    """Check user profiles for titles of held-out items; such users are excluded from evaluation."""
    name, result = f"user profiles of {data.dataset.name}", profile_leaks(data)
    if not result:
        return Check(name, f"none of {len(data.dataset.users):,} profiles names a held-out item")
    findings = tuple(f"user {item.user_id}: field {item.field!r} names held-out item {item.item_id}" for item in result)
    return Check(
        name, leak_warning(data, result), "notice", findings[:_MAX_EXAMPLES], {"users": len(leaking_users(result))}
    )


# --------------------------------------------------------------------------- candidates


def audit_candidate_sets(study: Study) -> list[Check]:
    """Check that candidate sets have one target, no other items of the user, and an order independent of the target."""
    data, sets, split = study.data, study.candidates, study.recipe.eval.split
    if sets is None:
        return []
    by_user = interacted_items(data, split)
    lacking, repeated, taken, positions = [], [], [], []
    for held in data.holdouts(split).of(sets.users):
        name = request_id(held.user_id, held.item_id)
        items = sets.sets.get(name, ())
        if held.item_id not in items:
            lacking.append(f"request {name}")
        else:
            positions.append(items.index(held.item_id))
        repeated += [f"request {name}: {item}" for item, times in Counter(items).items() if times > 1]
        taken += [f"request {name}: {item}" for item in items if item != held.item_id and item in by_user[held.user_id]]
    looked = f"{len(sets.sets):,} candidate sets"
    if study.recipe.eval.candidates.kind == "retrieved":
        # As in production, retrieved candidates may lack the target or contain other items that the user chose later.
        result = len(sets.sets) - len(lacking)
        about = [
            Check(
                "retrieved sets",
                f"{result:,} of {len(sets.sets):,} candidate sets contain the target, which limits HR",
            )
        ]
    else:
        about = [
            verdict("candidate sets without the target", looked, lacking),
            verdict("negatives with interactions of the user", looked, taken),
        ]
    return [
        *about,
        verdict("duplicate candidates", looked, repeated),
        _audit_target_positions(positions, sets.count),
        _audit_candidate_order(study, sets.sets),
    ]


def _audit_target_positions(positions: Sequence[int], count: int) -> Check:
    """Test whether target positions are uniformly distributed (chi-square test)."""
    name = "position of the target among its candidates"
    if len(positions) < 5 * count:
        return Check(name, f"not tested: {len(positions)} sets are too few for {count} positions", "notice")
    seen = np.bincount(positions, minlength=count)
    expected = len(positions) / count
    statistic = float(((seen - expected) ** 2 / expected).sum())
    p = float(chdtrc(count - 1, statistic))
    figures = {"chi2": statistic, "p": p}
    if p < _FALSE_POSITIVE_RATE:
        return Check(
            name, f"not uniform: p = {p:.2g}", "leak", (f"position {int(seen.argmax()) + 1} most often",), figures
        )
    return Check(name, f"uniform: p = {p:.2g} over {len(positions):,} sets", figures=figures)


def _audit_candidate_order(study: Study, sets: Mapping[str, Sequence[str]]) -> Check:
    """Check that the order of candidates is not correlated with popularity or ids."""
    counts = dict(study.data.train.group_by("item_id").len().iter_rows())
    ids = {item: index for index, item in enumerate(sorted(study.data.dataset.items))}
    name, figures = "order of the candidates", {}
    for what, key in (("popularity", counts), ("item ids", ids)):
        values = [np.array([key.get(item, 0) for item in items], dtype=float) for items in sets.values()]
        tested = [value for value in values if len(value) > 2 and np.ptp(value) > 0]
        if not tested:
            continue
        mean = float(np.mean([_order_correlation(value) for value in tested]))
        # The rank correlation of n shuffled items has variance 1 / (n - 1), so a few sets are not enough for a test.
        error = math.sqrt(sum(1 / (len(value) - 1) for value in tested)) / len(tested)
        figures[what] = mean
        if abs(mean) > max(5 * error, 0.05):
            return Check(name, f"follows {what}: mean rank correlation {mean:+.2f}", "leak", (), figures)
    shown = ", ".join(f"{value:+.3f} with {what}" for what, value in figures.items())
    return Check(name, f"shuffled: mean rank correlation {shown}", figures=figures)


def _order_correlation(values: np.ndarray[Any, Any]) -> float:
    # Equal values get the same rank, so that ties do not correlate with the order.
    return float(np.corrcoef(mean_ranks(values), np.arange(len(values)))[0, 1])


def audit_stored_rows(rows: Sequence[Mapping[str, Any]], predictions: pl.DataFrame, study: Study) -> list[Check]:
    """Check that all models of a table rank the same candidates."""
    unequal, foreign = [], []
    item_answers = [name for name, family in families().items() if family.answers_with_items]
    for family in item_answers:
        digests = {row["id"]: row.get("candidates") for row in rows if row["task"] == family}
        if len(set(digests.values())) > 1:
            unequal += [f"{row}: {digest}" for row, digest in digests.items()]
    sets = {**(study.candidates.sets if study.candidates else {}), **(study.aligned.sets if study.aligned else {})}
    ranked = predictions.filter(pl.col("task").is_in(item_answers) & pl.col("error").is_null())
    for row, request, parsed in ranked.select("row_id", "request_id", "parsed").iter_rows():
        items = json.loads(parsed)["items"] if parsed and parsed != "null" else []
        if request in sets and not set(items) <= set(sets[request]):
            foreign.append(f"{row}, request {request}")
    requests: dict[str, set[str]] = defaultdict(set)
    for row, request in predictions.select("row_id", "request_id").iter_rows():
        requests[row].add(request)
    by_family: dict[str, dict[str, frozenset[str]]] = defaultdict(dict)
    for row in rows:
        by_family[row["task"]][row["id"]] = frozenset(requests[row["id"]])
    different = [
        f"{family}: {row}" for family, seen in by_family.items() if len(set(seen.values())) > 1 for row in seen
    ]
    return [
        verdict("models of one table with different candidates", f"{len(rows)} rows", unequal),
        verdict("models of one table with different requests", f"{len(rows)} rows", different),
        verdict("ranked items that are not candidates", f"{len(ranked):,} answers", foreign),
    ]


# --------------------------------------------------------------------------- leaks into fitted models


def with_random_holdouts(
    data: SplitDataset, split: str, seed: int = 1, toward: Mapping[str, Sequence[str]] | None = None
) -> SplitDataset:
    """Replace the held-out items, ratings and texts of a split by random others.

    Items are drawn from the catalogue: a permutation of the same items among users would leave item counts unchanged,
    and miss a prior that depends on them.

    Args:
        data: The split data.
        split: ``valid`` or ``test``.
        seed: Seed of the draw.
        toward: Items by user, from which the held-out items of these users are drawn.
    """
    rng, items, ratings = np.random.default_rng(seed), sorted(data.dataset.items), data.train["rating"].drop_nulls()
    parts, pools = {"valid": data.valid, "test": data.test}, toward or {}
    frame = parts[split]
    results = [items[index] for index in rng.integers(len(items), size=len(frame))]
    for row, user in enumerate(frame["user_id"]):
        if pool := pools.get(user):
            results[row] = pool[int(rng.integers(len(pool)))]
    stars = frame["rating"].to_list()
    if len(ratings):
        drawn = ratings.gather(rng.integers(len(ratings), size=len(frame))).to_list()
        stars = [None if old is None else new for old, new in zip(stars, drawn, strict=True)]
    texts = [None if text is None else f"redrawn {row}" for row, text in enumerate(frame["text"])]
    parts[split] = frame.with_columns(
        pl.Series("item_id", results, pl.String).cast(frame["item_id"].dtype),
        pl.Series("rating", stars, pl.Float64),
        pl.Series("text", texts, frame["text"].dtype),
    )
    held = frozenset(pl.concat([*parts.values()]).select("user_id", "item_id").iter_rows())
    names = data.train.columns
    interactions = pl.concat([part.select(names) for part in (data.train, data.known, *parts.values())])
    dataset = replace(data.dataset, interactions=interactions)
    return replace(data, dataset=dataset, valid=parts["valid"], test=parts["test"], held_out=held)


def audit_baselines(study: Study) -> Check:
    """Check that the answers of baselines do not change if the held-out interactions change."""
    # A baseline of two tasks with the same data is fitted once.
    groups: dict[tuple[int, str], list[str]] = defaultdict(list)
    sections = {}
    for family in study.tasks:
        for baseline in study.baselines(family):
            groups[(id(study.task_data(family)), baseline.label)].append(family)
            sections[baseline.label] = baseline
    findings: list[str] = []
    others: dict[int, SplitDataset] = {}
    for (number, name), group in groups.items():
        data = study.task_data(group[0])
        if (seen := _feature_source_pairs(sections[name])) or number not in others:
            # A baseline that rejects features made from held-out interactions is not a changed answer.
            others[number] = with_random_holdouts(
                data, study.recipe.eval.split, toward=_unused_items_by_user(data, seen)
            )
        requests = [[case.request for case in study.cases(family)[:_BASELINE_REQUESTS]] for family in group]
        # The fit of the run can be reused; another number of threads may round differently, which is not a leak.
        first = fit_baseline(sections[name].name, sections[name].parameters, data, seed=study.recipe.seed)
        answers, others_answers = (
            [*map(item.answer, requests)] for item in (first, _refit_baseline(study, sections[name], others[number]))
        )
        if answers != others_answers and first.recalled:
            answers = [*map(_refit_baseline(study, sections[name], data).answer, requests)]
        findings += [
            f"{family}/{name}" for family, one, two in zip(group, answers, others_answers, strict=True) if one != two
        ]
    count = sum(map(len, groups.values()))
    return verdict("baselines that learned from held-out interactions", f"{count} fitted baselines", sorted(findings))


def audit_rankers(study: Study, rows: Sequence[Mapping[str, Any]], predictions: pl.DataFrame) -> Check | None:
    """Check that learned rankers use information about held-out items only through the scores of their members.

    Their other features are computed again with other held-out interactions, and must be the same. None if the run has
    no ranker.
    """
    if not any((row.get("fusion") or {}).get("trees") for row in rows):
        return None
    every = [Row.model_validate(row) for row in rows]
    learned = [row for row in every if row.fusion is not None and row.fusion.trees is not None]
    wrong = []
    for row in learned:
        cases, data = study.cases(row.task), study.task_data(row.task)
        parts = _stored_members(row, every, predictions)
        assert row.fusion is not None
        weights = restore_weights(row.fusion)
        other = with_random_holdouts(with_random_holdouts(data, "valid", 1), "test", 2)
        cells, again = (
            ListEnsemble(row.id, parts, weights, ContextFeatures(known)).known(cases)[0] for known in (data, other)
        )
        wrong += [f"{row.id}: {name} depends on held-out interactions" for name in changed_features(cells, again)]
    return verdict("held-out items in the features of ensemble rankers", f"{len(learned)} rankers", wrong)


def changed_features(cells: CandidateScores, again: CandidateScores) -> list[str]:
    """Return the features that change if the held-out interactions change."""
    return [
        name
        for name, values in cells.context.items()
        if not np.array_equal(values, again.context[name], equal_nan=True)
    ]


def _stored_members(row: Row, rows: Sequence[Row], predictions: pl.DataFrame) -> list[ListMember]:
    """Return the members of an ensemble with their stored answers to the evaluated requests."""
    assert row.fusion is not None
    result = []
    for part in row.fusion.parts:
        member = next(
            other
            for other in rows
            if other.task == row.task
            and other.predictor == part.name
            and (other.arm == "baseline" or (other.arm, other.template) == (row.arm, row.template))
        )
        kind = baseline_score_scale(part.name.partition("(")[0]) if member.arm == "baseline" else "logits"
        stored = predictions.filter(pl.col("row_id") == member.id)
        texts = dict(stored.select("request_id", "parsed").iter_rows())
        answers = restore_answers({request: json.loads(text) if text else None for request, text in texts.items()}, ())
        result.append(
            ListMember(part.name, PrecomputedMember(part.name, member.reads or "events", kind, answers), kind)
        )
    return result


def _refit_baseline(study: Study, baseline: BaselineSection, data: SplitDataset) -> Any:
    predictor = create_baseline(baseline.name, baseline.parameters, seed=study.recipe.seed)
    predictor.fit(data)
    return predictor


def _feature_source_pairs(baseline: BaselineSection) -> frozenset[Pair]:
    """Return the interactions from which the feature texts of a baseline were generated."""
    stores = feature_store_hashes(baseline.name, baseline.parameters)
    return frozenset().union(*(FeatureStore.open(folder).seen() for folder in stores))


def _unused_items_by_user(data: SplitDataset, seen: frozenset[Pair]) -> dict[str, list[str]]:
    """Return, by user, the items that were not used to generate the user's text."""
    read: dict[str, set[str]] = defaultdict(set)
    for user, item in seen:
        read[user].add(item)
    items = sorted(data.dataset.items)
    return {user: rest for user, known in read.items() if (rest := [item for item in items if item not in known])}


def audit_feature_texts(study: Study) -> Check | None:
    """Check that no feature text of a baseline was generated from a held-out interaction."""
    stores = {
        folder: family
        for family in study.tasks
        for baseline in study.baselines(family)
        for folder in feature_store_hashes(baseline.name, baseline.parameters)
    }
    if study.recipe.data.texts is not None:
        stores.setdefault(study.recipe.data.texts.path, next(iter(study.tasks)))
    if not stores:
        return None
    findings, rows = [], 0
    for folder, family in sorted(stores.items()):
        data = study.task_data(family)
        seen = FeatureStore.open(folder, split=data.readable).seen()
        findings += [f"{folder}: {user} has {item} held out" for user, item in sorted(seen & data.held_out)]
        rows += sum(pair in seen for pair in data.train.select("user_id", "item_id").iter_rows())
    result = verdict("generated texts based on held-out interactions", f"{len(stores)} stores", findings)
    text = (
        f"{result.found}; the texts also use {rows:,} training interactions, which CTR networks exclude from training"
    )
    return replace(result, found=text, figures={"training_rows_seen": float(rows)})


def audit_item_index(study: Study) -> Check | None:
    """Check that item codes do not change if only held-out interactions change.

    The index is rebuilt with other held-out items, and must be equal in every byte.
    """
    section, index = study.recipe.index, study.index
    if section is None or index is None:
        return None
    name = "item index that learned from held-out interactions"
    if section.scheme == "external":
        return Check(name, "not tested: the codes were read from a file, so their origin is unknown", "notice")
    other = study.data
    for split in ("valid", "test"):
        other = with_random_holdouts(other, split)
    again = build_index(section, other, seed=study.recipe.seed)
    if again.digest != index.digest:
        # The stored index may have been built with another number of threads, which round differently.
        index = build_index(section, study.data, seed=study.recipe.seed, fresh=True)
    if again.digest == index.digest:
        return Check(name, f"none: all {len(index.codes):,} codes stay the same with other held-out interactions")
    moved = [f"item {item}" for item, pieces in index.codes.items() if again.codes.get(item) != pieces]
    result = (
        f"{len(moved):,} of {len(index.codes):,} codes depend on held-out interactions"
        if moved
        else "the codebooks depend on held-out interactions"
    )
    return Check(name, result, "leak", tuple(moved[:_MAX_EXAMPLES]))


# --------------------------------------------------------------------------- training examples and prompts


# Many users write shorter texts ("good", "love it") about many items.
_MIN_TEXT_LENGTH = 24
# Number of characters to search for in prompts, which truncate long texts.
_SEARCHED_CHARACTERS = 120
# Template variables for the title and for the code of the item that a template asks about.
_TITLES, _CODES = re.compile(r"\bitem\.title\b"), re.compile(r"\bitem(?:\.code|_id)\b")
# Number of training examples per task, and of requests, that are rendered again with other held-out data.
_ROWS, _REQUESTS = 5000, 200


class _HeldOutTexts:
    """Titles and texts of a user's held-out items that do not occur in the user's training interactions.

    With an index, for templates that write codes, these are codes instead of titles.
    """

    def __init__(self, data: SplitDataset, index: ItemIndex | None = None) -> None:
        items = data.dataset.items
        written = data.dataset.titles if index is None else {item: clean(index.encode(item)) for item in items}
        self._written, self._coded = written, index is not None

        def parts(user: str, item: str, text: str | None) -> list[str]:
            review = data.dataset.reviews.get((user, item))
            texts = [text or "", *([review.text, review.headline, review.sentence] if review else [])]
            return [clean(part, len(part)) for part in texts]

        known: dict[str, set[str]] = defaultdict(set)
        wrote: dict[str, list[str]] = defaultdict(list)
        for frame in (data.train, data.known):
            for user, item, text in frame.select("user_id", "item_id", "text").iter_rows():
                known[user].add(written[item])
                wrote[user] += parts(user, item, text)
        self.titles: dict[str, dict[str, str]] = defaultdict(dict)
        self.texts: dict[str, dict[str, str]] = defaultdict(dict)
        for frame in (data.valid, data.test):
            for user, item, text in frame.select("user_id", "item_id", "text").iter_rows():
                title = written[item]
                if title not in known[user]:
                    self.titles[user][title] = item
                for full in parts(user, item, text):
                    excerpt = full[:_SEARCHED_CHARACTERS]
                    # Some users repeat sentences: a text that is also in training reveals nothing.
                    if len(excerpt) >= _MIN_TEXT_LENGTH and not any(excerpt in earlier for earlier in wrote[user]):
                        self.texts[user][excerpt] = item

    def shown(self, user: str, segments: Iterable[Segment], drawn: Mapping[str, int] | None = None) -> Iterator[str]:
        """Yield the held-out items of a user whose title or text occurs in a prompt.

        Args:
            user: The user of the items.
            segments: The segments that are shown.
            drawn: Titles of drawn negatives, with the permitted number of occurrences.
        """
        titles, written, left = self.titles.get(user, {}), self.texts.get(user, {}), Counter(drawn)
        for segment in segments:
            if segment.kind == "text":
                continue
            text = clean(segment.text)
            if text in titles and left[text] <= 0:
                yield f"user {user}, title of held-out item {titles[text]}"
            left[text] -= 1
            yield from (
                f"user {user}, text about held-out item {item}" for review, item in written.items() if review in text
            )

    def negatives(self, example: Example, template: Template) -> Mapping[str, int]:
        """Return the titles of random negatives, with the number of times that each may occur.

        It is the count of the least frequent candidate, or of the item in a template about one item: a held-out item
        that is also in the history, or in a hint, occurs once more. Questions without candidates or an item contain no
        negatives, which are then in rejected answers.
        """
        texts = self.drawn(example)
        if not texts or not (family_of(example.task).lists or asks_for(template) == "yes"):
            return {}
        if asks_for(template) == "yes":
            mention = _CODES if self._coded else _TITLES
            often = len(mention.findall(template.system)) + len(mention.findall(template.user))
        else:
            named = Counter(clean(segment.text) for segment in _segments(example.messages) if segment.kind != "text")
            listed = texts + Counter(self._written[item] for _, item in example.pairs[-1:])
            # A truncated or escaped title is not found, which does not affect other titles.
            often = min((named[text] // times for text, times in listed.items() if named[text]), default=0)
        return {text: times * often for text, times in texts.items()}

    def drawn(self, example: Example) -> Counter[str]:
        """Count how often each title was drawn as a negative of a training example."""
        return Counter(self._written[item] for item in example.negatives)


def _segments(messages: Iterable[Message], answer: Iterable[Segment] = ()) -> Iterator[Segment]:
    for message in messages:
        yield from message.segments
    yield from answer


def audit_training_rows(study: Study, family: str, count: int) -> Check:
    """Check that no training example of a task contains a held-out pair.

    A held-out item may be a negative, since negatives are drawn without reading held-out data
    (`audit_training_row_independence`). It may occur nowhere else.
    """
    data = study.task_data(family)
    held = frozenset().union(*(table.held_out for table in study.tables))
    index = study.codes(family)
    titles, codes = _HeldOutTexts(data), _HeldOutTexts(data, index) if index is not None else None
    coded_ids = study.recipe.index is not None and study.recipe.index.ids != "text"
    findings = []
    for example in _first_training_examples(study, study.training_tasks[family], count):
        template = study.templates[family][example.template.rpartition("/")[2]]
        findings += [f"row {example.id}: pair {pair}" for pair in example.pairs if pair in held]
        shows_ids = "item_id" in template.names("system", "user", "lead", "target")
        if codes is not None and (template.writes_codes or (coded_ids and shows_ids)):
            findings += [f"row {example.id}: {what}" for what in _held_out_mentions(example, codes, template)]
        if codes is None or template.writes_titles or not template.writes_codes:
            findings += [f"row {example.id}: {what}" for what in _held_out_mentions(example, titles, template)]
    return verdict(f"training rows of {family}", f"{count:,} rows", findings)


def _first_training_examples(study: Study, task: Task, count: int) -> Iterator[Example]:
    """Yield the first training examples of a task, both unpacked and packed."""
    section = study.recipe.train
    if section.reward is not None:
        template = task.eval_templates[0]
        yield from (training_question(task, case, template) for case in islice(task.training_cases(), count))
        return
    yield from islice(training_examples(task, section.examples, study.training_seed), count)
    if section.packing == "tree" and section.examples is None and isinstance(task, BranchingTask) and task.branches:
        yield from islice(_packed_examples(task, sorted(study.data.users())), count)


def _packed_examples(task: BranchingTask, users: Sequence[str]) -> Iterator[Example]:
    for number in numbers():
        results = [row for user in users if (row := task.branch(number, user)) is not None]
        if not results:
            return
        yield from results


def _held_out_mentions(example: Example, secrets: _HeldOutTexts, template: Template) -> Iterator[str]:
    question = tuple(_segments(example.messages))
    yield from secrets.shown(example.user_id, question, secrets.negatives(example, template))
    yield from secrets.shown(example.user_id, example.answer)
    # Rejected texts are written by other users, who may have written the same.
    if family_of(example.task).answers_with_items:
        rejected = [Segment("target", text) for text in example.rejected]
        yield from secrets.shown(example.user_id, rejected, secrets.drawn(example))


def audit_questions(study: Study, family: str) -> Check:
    """Check that no prompt contains its answer, in the history, the profile or elsewhere."""
    cases, findings = study.cases(family), []
    titles = frozenset(study.task_data(family).dataset.titles.values() if family_of(family).answers_with_items else ())
    for case in cases:
        request, truth = case.request, str(case.truth)
        if family_of(family).ranks_for_users and any(event.item_id == truth for event in request.history):
            findings.append(f"request {request.id}: the history contains the target")
        findings += [
            f"request {request.id}: {what}" for what in _templates_revealing_answer(study, family, case, titles)
        ]
        if request.item is not None and any(event.item_id == request.item for event in request.history):
            findings.append(f"request {request.id}: the history contains the item to predict")
    names = ", ".join(template.name for template in study.eval_templates(family))
    return verdict(f"questions of {family}", f"{len(cases):,} requests ({names})", findings)


def _templates_revealing_answer(study: Study, family: str, case: Case, titles: frozenset[str]) -> Iterator[str]:
    """Yield the templates whose prompt contains the answer."""
    data, request = study.task_data(family), case.request
    kind = family_of(family)
    ranked = kind.answers_with_items
    secret = data.dataset.titles[str(case.truth)] if ranked else clean(str(case.truth))[:_SEARCHED_CHARACTERS]
    # A review may contain the words of its headline, which the task is to find.
    if kind.quotes or (not ranked and len(secret) < _MIN_TEXT_LENGTH):
        return
    # A text that the user also wrote about an earlier item ("as described") is part of the history.
    if not ranked and any(secret in clean(event.text or "") for event in request.history):
        return
    others = {data.dataset.titles[event.item_id] for event in request.history}
    for template in study.eval_templates(family):
        query = request
        if kind.lists and asks_for(template) == "yes":
            if (other := _other_candidate(case, data)) is None:
                continue
            query = replace(request, candidates=(other,))
        prompt = study.tasks[family].prompt(query, template=template.name)
        # Candidates always include the answer.
        listed = query.candidates is not None and str(case.truth) in query.candidates and kind.lists
        codes, shows_titles = _secret_forms(kind, template)
        index = study.codes(family)
        if codes and not listed and index is not None:
            code = clean(index.encode(str(case.truth)))
            if any(
                s.kind != "text" and clean(s.text) == code for s in _segments(prompt.messages, prompt.answer_prefix)
            ):
                yield f"the prompt of {template.id} shows the answer"
        if not shows_titles:
            continue
        for segment in _segments(prompt.messages, prompt.answer_prefix):
            if segment.kind == "text":
                continue
            text = clean(segment.text)
            if text in others or (listed and text == secret):
                continue  # another item with the same title in the history
            # A title may be contained in another ("Alien", "Aliens").
            if text == secret or (text not in titles and len(secret) >= MIN_TITLE_LENGTH and secret in text):
                yield f"the prompt of {template.id} shows the answer"
                break


def _other_candidate(case: Case, data: SplitDataset) -> str | None:
    """Return a candidate whose title differs from the answer, for a prompt that must not contain the answer."""
    titles, truth = data.dataset.titles, str(case.truth)
    return next((item for item in case.request.candidates or () if titles[item] != titles[truth]), None)


def _secret_forms(family: Family, template: Template) -> tuple[bool, bool]:
    """Return whether a prompt must not contain the code of the answer, and whether not the title."""
    if family.candidates == "items":
        # The prompt contains either the title or the code, and the answer is the other one.
        return template.answers_with_code, not template.answers_with_code
    return template.writes_codes, template.writes_titles or not template.writes_codes


def audit_few_shot_examples(study: Study, family: str) -> Check:
    """Check the few-shot examples of evaluated requests for held-out pairs."""
    recipe, task, data = study.recipe, study.tasks[family], study.task_data(family)
    findings: list[str] = []
    secrets, cases = _HeldOutTexts(data), study.cases(family)
    for case in cases:
        for window in task.draw_shots(case.request, recipe.eval.shots.k).windows:
            findings += [
                f"request {case.request.id}: example of user {window.user_id} shows held-out item {event.item_id}"
                for event in window.events
                if (window.user_id, event.item_id) in data.held_out
            ]
            segments = [Segment("item", event.text) for event in window.events if event.text]
            findings += [f"request {case.request.id}: {what}" for what in secrets.shown(window.user_id, segments)]
    return verdict(f"few-shot examples of {family}", f"{len(cases):,} requests", findings)


# --------------------------------------------------------------------------- rendering with other held-out data


def audit_training_row_independence(study: Study, family: str, count: int) -> Check:
    """Check that the text, order and negatives of training examples do not depend on held-out interactions."""
    task, count = study.training_tasks[family], min(count, _ROWS)
    toward = _shown_unseen_items(study, family, map(_example_contents, _first_training_examples(study, task, count)))
    other = _task_with_other_holdouts(study, family, toward, study.training_seed)
    pairs = zip_longest(_first_training_examples(study, task, count), _first_training_examples(study, other, count))
    findings = [f"row {(one or two).id}" for one, two in pairs if one != two]
    return verdict(f"training rows of {family} that depend on held-out interactions", f"{count:,} rows", findings)


def audit_validation_row_independence(study: Study, family: str) -> Check:
    """Check that the examples of validation losses do not depend on test interactions."""
    limit = study.recipe.train.valid_rows // len(study.tasks)
    rows = list(study.tasks[family].examples("valid", limit))
    toward = _shown_unseen_items(study, family, map(_example_contents, rows))
    other = _task_with_other_holdouts(study, family, toward, study.recipe.seed, splits=("test",)).examples(
        "valid", limit
    )
    findings = [f"row {(one or two).id}" for one, two in zip_longest(rows, other) if one != two]
    return verdict(f"validation rows of {family} that depend on test interactions", f"{len(rows):,} rows", findings)


def audit_few_shot_independence(study: Study, family: str) -> Check:
    """Check that few-shot examples do not depend on held-out interactions."""
    task, shots = study.tasks[family], study.recipe.eval.shots.k
    ways = [way for case in study.cases(family)[:_REQUESTS] for way in _prompt_variants(study, family, case.request)]
    prompts = [_render_variant(task, way, shots) for way in ways]
    shown_by = [
        (window.user_id, _segments(prompt.messages), ())
        for (request, *_), prompt in zip(ways, prompts, strict=True)
        for window in task.draw_shots(request, shots).windows
    ]
    other = _task_with_other_holdouts(study, family, _shown_unseen_items(study, family, shown_by), study.recipe.seed)
    findings = [
        f"request {way[0].id}: the prompt of {way[1].id}"
        for way, prompt in zip(ways, prompts, strict=True)
        if _render_variant(other, way, shots) != prompt
    ]
    name = f"few-shot examples of {family} that depend on held-out interactions"
    return verdict(name, f"{len(ways):,} prompts", findings)


def audit_position_question_independence(study: Study, family: str) -> Check | None:
    """Check that prompts for position bias do not depend on held-out interactions."""
    section = study.recipe.eval
    if section.debias != "measured" or not any(map(is_positional, study.section(family).strategies)):
        return None
    requests = study.tasks[family].questions(section.debias_questions)
    toward: dict[str, list[str]] = defaultdict(list)
    for request in requests:
        toward[request.user_id] += request.candidates or ()
    again = _task_with_other_holdouts(study, family, toward, study.recipe.seed).questions(section.debias_questions)
    findings = [f"question {one.id}" for one, two in zip(requests, again, strict=True) if one != two]
    name = f"position questions of {family} that depend on held-out interactions"
    return verdict(name, f"{len(requests):,} questions", findings)


_PromptVariant = tuple[Request, Template, Want]


def _prompt_variants(study: Study, family: str, request: Request) -> Iterator[_PromptVariant]:
    """Yield the evaluation prompts of a request for every template: with all candidates, and with one candidate."""
    for template in study.eval_templates(family):
        one, asks = replace(request, candidates=(request.candidates or ())[:1]), asks_for(template)
        if not family_of(family).lists:
            yield request, template, "one"
        elif asks == "yes":
            yield one, template, "yes"
        else:
            yield request, template, "one"
            if asks == "label" and "pointwise-yes" in study.section(family).strategies:
                yield one, template, "yes"


def _render_variant(task: Task, way: _PromptVariant, shots: int) -> Prompt:
    request, template, want = way
    return task.prompt(request, template=template.name, shots=shots, want=want)


def _example_contents(row: Example) -> tuple[str, Iterable[Segment], Iterable[str]]:
    return row.user_id, _segments(row.messages, row.answer), row.negatives


def _task_with_other_holdouts(
    study: Study, family: str, toward: Mapping[str, Sequence[str]], seed: int, splits: Sequence[str] = ("valid", "test")
) -> Task:
    """Return a task on data with other held-out interactions, and the same candidates and codes."""
    items = study.task_data(family).dataset.items

    def other(data: SplitDataset) -> SplitDataset:
        for split in splits:
            # The second table has other users and items.
            data = with_random_holdouts(data, split, toward=toward if data.dataset.items is items else None)
        return data

    reviews = None if study.reviews is None else other(study.reviews)
    changed = replace(study, data=other(study.data), reviews=reviews)
    return build_task(changed, family, study.section(family), study.templates[family], seed)


def _shown_unseen_items(
    study: Study, family: str, shown_by: Iterable[tuple[str, Iterable[Segment], Iterable[str]]]
) -> Mapping[str, Sequence[str]]:
    """Return, by user, the items in training examples that the user has no training interaction with.

    Other held-out items are drawn from these: a row that avoids held-out items as negatives changes only if one of its
    negatives becomes held out, and an item drawn from the whole catalogue is rarely one of them. ``shown_by`` contains
    users with their segments, and items that are known to be shown.
    """
    data, index = study.task_data(family), study.codes(family)
    items: dict[str, set[str]] = defaultdict(set)
    for item, title in data.dataset.titles.items():
        for text in (title, clean(item), *([clean(index.encode(item))] if index is not None else [])):
            items[text].add(item)
    trained: dict[str, set[str]] = defaultdict(set)
    for user, item in data.train.select("user_id", "item_id").iter_rows():
        trained[user].add(item)
    result: dict[str, set[str]] = defaultdict(set)
    for user, segments, known in shown_by:
        named = (items.get(clean(segment.text), set()) for segment in segments if segment.kind != "text")
        result[user] |= set(known).union(*named) - trained[user]
    return {user: sorted(names) for user, names in result.items() if names}


# --------------------------------------------------------------------------- alignment of codes and titles


FAMILY = "alignment"


def audit_alignment(study: Study, count: int) -> Iterator[Check]:
    """Yield the checks of the alignment task and its first ``count`` training rows, if the recipe trains it."""
    if study.held is None:
        return
    task = study.tasks[FAMILY]
    held = study.held.items
    if FAMILY in study.shares:
        rows = islice(study.training_examples(FAMILY), count)
        titles = {item: display_title(item, study.data.dataset.items[item]) for item in held}
        index = study.index
        codes = {_normalise_line(index.encode(item)): item for item in held} if index is not None else {}
        findings = [f"row {row.id}: {what}" for row in rows for what in _held_out_items_shown(row, titles, codes)]
        yield verdict("held-out items in training rows of alignment", f"{count:,} rows", findings)
    cases = study.cases(FAMILY)
    if is_arm_evaluated(study.recipe, FAMILY, "few-shot"):
        shots = study.recipe.eval.shots.k
        seen = (
            (case, event) for case in cases for w in task.draw_shots(case.request, shots).windows for event in w.events
        )
        findings = [f"request {case.request.id}: item {event.item_id}" for case, event in seen if event.item_id in held]
        yield verdict("held-out items in few-shot examples of alignment", f"{len(cases):,} requests", findings)
    part = set(study.held.part(study.recipe.eval.split))
    yield verdict(
        "alignment candidates", f"{len(cases):,} sets", [w for case in cases for w in _candidate_set_errors(case, part)]
    )


def _held_out_items_shown(row: Example, titles: Mapping[str, str], codes: Mapping[str, str]) -> Iterator[str]:
    """Yield the held-out items in an example, as declared or by both code and title.

    ``titles`` has the title of each held-out item, and ``codes`` the item of each code.
    """
    yield from (f"item {item}" for _, item in row.pairs if item in titles)
    lines = {_normalise_line(segment.text) for segment in _segments(row.messages, row.answer) if segment.kind != "text"}
    # A code of digits may equal a year by chance, so a code alone proves nothing.
    for item in sorted(codes[text] for text in lines & codes.keys()):
        if titles[item] in lines:
            yield f"code and title of item {item}"


def _normalise_line(text: str) -> str:
    return break_item_tokens(clean(text)).strip()


def _candidate_set_errors(case: Case, part: set[str]) -> Iterator[str]:
    """Yield the errors of a candidate set: it lacks the answer, or has items of another part of the split."""
    candidates, name = case.request.candidates or (), case.request.id
    if case.truth not in candidates:
        yield f"request {name}: the answer is missing"
    yield from (f"request {name}: {item} is repeated" for item, n in Counter(candidates).items() if n > 1)
    yield from (f"request {name}: {item} is not an item of this split" for item in candidates if item not in part)
    if case.request.item is not None:
        yield f"request {name}: the request names the answer"
