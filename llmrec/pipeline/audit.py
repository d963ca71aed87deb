"""The audit of a run: checks for leaks and duplicates (`run_checks`), and their results in ``audit.json``.

The checks for held-out data are in `llmrec.pipeline.leaks`; the probes at the end look for other explanations of a
metric than skill.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.baselines.parameters import input_hashes
from llmrec.data.hashing import hash64
from llmrec.data.split import SplitDataset
from llmrec.durable import sha256_of, write_checked_json
from llmrec.errors import LlmrecError
from llmrec.fingerprint import fingerprint
from llmrec.index.table import ItemIndex
from llmrec.index.titles import title_key
from llmrec.machine import package_versions
from llmrec.models.load import resolve_model_folder, silence_libraries
from llmrec.pipeline import leaks
from llmrec.pipeline.leaks import Check
from llmrec.pipeline.rejecting import load_backend, release_backend
from llmrec.pipeline.resume import lock_folder, read_stage
from llmrec.pipeline.row_specs import is_arm_evaluated
from llmrec.pipeline.study import Study, build_study
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.load import load_stored_recipe
from llmrec.registry import BASELINES
from llmrec.report import page
from llmrec.report.audit import LeakError
from llmrec.report.results import check_predictions_file, parse_results, read_results_json, rewrite_advice
from llmrec.tasks.base import seeded_random
from llmrec.tasks.family import family_of
from llmrec.types import Backend, Prompt

log = logging.getLogger(__name__)

FILE = "audit.json"
# Packages whose version can change fitted baselines.
_FITTING_PACKAGES = ("numpy", "scipy", "torch", "implicit", "polars")
# Training examples of a task to check if no model was trained.
_UNTRAINED_ROWS = 100


def audit(folder: Path, *, memory: bool = False) -> list[Check]:
    """Audit a finished run from its folder, write ``audit.json``, and update the report.

    The report of a run with a leak says so and contains no metric. ``memory`` loads the untuned model and checks
    whether it has memorised the catalogue.

    Raises:
        LlmrecError: If the folder has no finished run, or one of its files is damaged.
    """
    recipe, stored = folder / "recipe.yaml", folder / "results.json"
    # On a read-only disk nothing can be locked or written.
    writable = os.access(folder, os.W_OK)
    if not recipe.is_file() or not stored.is_file():
        raise LlmrecError(
            f"{folder} does not contain a finished run (recipe.yaml and results.json); finish the run with `llmrec "
            "run`",
            kind="missing-file",
            at=folder,
        )
    with lock_folder(folder) if writable else nullcontext():
        results = read_results_json(folder)
        check_predictions_file(folder, parse_results(results, source=str(stored), fix=rewrite_advice(folder)).files)
        predictions = _read_predictions(folder)
        study = build_study(load_stored_recipe(folder))
        checks = list(run_checks(study, results, predictions))
        if memory:
            checks.append(_run_memorisation_probe(study))
        if writable:
            write(folder, checks, of=sha256_of(stored))
            with suppress(LeakError):
                page.write_report(folder)
    if not writable:
        log.warning("%s is not writable, so audit.json and the report are not updated", folder)
    return checks


def _read_predictions(folder: Path) -> pl.DataFrame:
    """Return the answers stored by a run."""
    path = folder / "predictions.parquet"
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise LlmrecError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}). {rewrite_advice(folder)}",
            kind="damaged",
            at=path,
        ) from error


def run_checks(
    study: Study, results: Mapping[str, Any], predictions: pl.DataFrame, *, kept: Path | None = None
) -> Iterator[Check]:
    """Run and yield every check of a run that needs no language model.

    Fitting the baselines takes long: ``kept`` is the file with the stored check of them; without it they are fitted
    again.
    """
    split = study.recipe.eval.split
    for data in study.tables:
        yield leaks.audit_training_interactions(data)
        yield leaks.audit_profiles(data)
    training = results.get("training")
    for family in study.tasks:
        if family in study.shares:
            yield leaks.audit_training_rows(study, family, _drawn_example_count(training, family))
            yield leaks.audit_training_row_independence(study, family, _drawn_example_count(training, family))
            if split == "test" and study.recipe.train.valid_rows:
                yield leaks.audit_validation_row_independence(study, family)
        yield leaks.audit_questions(study, family)
        if is_arm_evaluated(study.recipe, family, "few-shot"):
            yield leaks.audit_few_shot_examples(study, family)
            yield leaks.audit_few_shot_independence(study, family)
        if (positions := leaks.audit_position_question_independence(study, family)) is not None:
            yield positions
    # The model that selects rejected items is no longer needed.
    release_backend()
    yield from leaks.audit_candidate_sets(study)
    yield from leaks.audit_alignment(study, _drawn_example_count(training, "alignment"))
    yield from leaks.audit_stored_rows(results["rows"], predictions, study)
    yield _cached_baseline_audit(study, kept) if kept is not None else leaks.audit_baselines(study)
    learned = leaks.audit_rankers(study, results["rows"], predictions)
    for result in (learned, leaks.audit_item_index(study), leaks.audit_feature_texts(study)):
        if result is not None:
            yield result
    yield audit_id_arithmetic(study.data, split)
    if study.index is not None:
        yield audit_code_arithmetic(study.index, study.data, split)
    yield audit_duplicate_items(study.data)
    if any(family_of(family).ranks_for_users for family in study.tasks):
        yield audit_duplicate_users(study.data, split)


def _cached_baseline_audit(study: Study, kept: Path) -> Check:
    """Check the baselines for leaks, or return the stored result."""
    used = {family: study.task_data(family) for family in study.tasks}
    sections = [baseline for family in used for baseline in study.baselines(family)]
    key = fingerprint(
        "audit",
        made_by=[(BASELINES, baseline.name) for baseline in sections],
        modules=(leaks.__name__,),
        packages={name: version for name, version in package_versions().items() if name in _FITTING_PACKAGES},
        baselines={family: [baseline.label for baseline in study.baselines(family)] for family in used},
        files=[read for item in sections if (read := input_hashes(item.name, item.parameters))],
        data={family: data.fingerprint for family, data in used.items()},
        cases={family: [case.request.id for case in study.cases(family)] for family in used},
        candidates={family: sets.digest for family in used if (sets := study.sets(family)) is not None},
        split=study.recipe.eval.split,
        seed=study.recipe.seed,
    )
    stored = read_stage(kept, key, _parse_check)
    if stored is None:
        stored = {"key": key, "check": asdict(leaks.audit_baselines(study))}
        write_checked_json(kept, stored)
    return _parse_check(stored)


def _parse_check(stored: Mapping[str, Any]) -> Check:
    result = stored["check"]
    return Check(**{**result, "examples": tuple(result["examples"])})


def write(folder: Path, checks: Sequence[Check], *, of: str) -> None:
    """Write the checks and the number of leaks to ``audit.json``.

    ``of`` is the sha256 of ``results.json``, so that the report never shows the audit of other results.
    """
    leak_count = sum(check.verdict == "leak" for check in checks)
    results = [asdict(check) for check in checks]
    write_checked_json(folder / FILE, {"results_sha256": of, "leaks": leak_count, "checks": results})


def _drawn_example_count(training: Mapping[str, Any] | None, family: str) -> int:
    """Return how many training examples of a task were drawn, including those that were too long."""
    if training is None:
        return _UNTRAINED_ROWS
    return int(training["rows"].get(family, 0)) + int(training.get("dropped", {}).get(family, 0))


def _run_memorisation_probe(study: Study) -> Check:
    silence_libraries()
    section, seed = study.recipe.model, study.recipe.seed
    try:
        backend = load_backend(resolve_model_folder(section, seed=seed), section, study.recipe.eval.batch_tokens)
        return audit_memorisation(backend, study.data, seed=seed)
    finally:
        release_backend()


# --------------------------------------------------------------------------- probes


_HASHES, _BANDS = 64, 16
_MAX_BUCKET = 50
_SOLVED, _TITLES = 4, 200
_PERMUTATION_ROUNDS = 20


# --------------------------------------------------------------------------- arithmetic on ids


def audit_id_arithmetic(data: SplitDataset, split: str) -> Check:
    """Compute HR@5 of a rule that predicts ids by arithmetic: largest + 1, last + 1, largest + 2, last + 2, ...

    It is compared with the same rule over permuted ids. If it is well above that, the numbering predicts the next item:
    legitimate if ids follow training order, a leak if held-out interactions took part in it (P5's published ids reach
    .0524 on Beauty).
    """
    numbers = {item: int(result[0]) for item in data.dataset.items if len(result := re.findall(r"\d+", item)) == 1}
    if len(numbers) < 0.9 * len(data.dataset.items):
        return Check("id arithmetic", "not tested: item IDs do not contain exactly one number")
    return _audit_arithmetic("id arithmetic", "ids", numbers, data, split)


def audit_code_arithmetic(index: ItemIndex, data: SplitDataset, split: str) -> Check:
    """Compute HR@5 of the same rule applied to the codes of an item index.

    A model can reach the same HR@5 by counting from the codes of the history. Values above those of a random ranking
    are legitimate for numbers in training order, and for codes of a tree in which neighbours were chosen together.
    """
    name = "code arithmetic"
    if index.scheme == "title":
        return Check(name, "not tested: titles have no meaningful order")
    pieces = {item: [int(n) for n in re.findall(r"\d+", "".join(code))] for item, code in index.codes.items()}
    order = sorted(pieces, key=lambda item: (pieces[item], item))
    single = all(len(result) == 1 for result in pieces.values()) and not index.tokens
    numbers = {item: pieces[item][0] for item in order} if single else {item: n for n, item in enumerate(order)}
    return _audit_arithmetic(name, "codes", numbers, data, split)


def _audit_arithmetic(name: str, what: str, numbers: dict[str, int], data: SplitDataset, split: str) -> Check:
    held = [(h, data.history(h.user_id, split)) for h in data.holdouts(split)]  # type: ignore[arg-type]
    pairs = [([e.item_id for e in past if e.item_id in numbers], h.item_id) for h, past in held if h.item_id in numbers]
    pairs = [(past, target) for past, target in pairs if past]
    if not pairs:
        return Check(name, "not tested: no held-out request has a history")
    rate = _counting_rule_hit_rate(pairs, numbers)
    rng, items = np.random.default_rng(0), list(numbers)
    values = np.array([numbers[item] for item in items])
    dealt = [
        _counting_rule_hit_rate(pairs, dict(zip(items, rng.permutation(values).tolist(), strict=True)))
        for _ in range(_PERMUTATION_ROUNDS)
    ]
    chance = float(np.mean(dealt))
    figures = {"HR@5": rate, "chance": chance}
    return Check(name, f"counting rule: HR@5 {rate:.4f}; with random {what}: {chance:.4f}", "notice", (), figures)


def _counting_rule_hit_rate(pairs: Sequence[tuple[list[str], str]], numbers: dict[str, int]) -> float:
    by_number = {number: item for item, number in numbers.items()}
    hits = 0
    for past, target in pairs:
        seen = {numbers[item] for item in past}
        last, largest = numbers[past[-1]], max(seen)
        guesses: list[int] = []
        for step in range(1, 40):
            for guess in (largest + step, last + step):
                if guess in by_number and guess not in seen and guess not in guesses:
                    guesses.append(guess)
            if len(guesses) >= 5:
                break
        hits += numbers[target] in guesses[:5]
    return hits / len(pairs)


# --------------------------------------------------------------------------- near-duplicates


def find_near_duplicates(sets: Sequence[frozenset[str]], threshold: float) -> list[tuple[int, int, float]]:
    """Return pairs of sets whose Jaccard similarity reaches a threshold, using MinHash banding.

    64 permutations in 16 bands of 4 find a pair of similarity .9 with probability .999997, one of .8 with .9998
    (Broder, "On the resemblance and containment of documents", 1997; Leskovec et al., "Mining of Massive Datasets",
    section 3.4); every pair that is found is checked exactly.

    Args:
        sets: Any sets of strings; empty ones are skipped.
        threshold: Lowest similarity.

    Returns:
        (first, second, similarity), first < second, sorted.
    """
    words = sorted(frozenset().union(*sets)) if sets else []
    index = {word: n for n, word in enumerate(words)}
    base = hash64("minhash", 0, words) if words else np.empty(0, dtype=np.uint64)
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 2**63, size=_HASHES, dtype=np.uint64) | np.uint64(1)
    offsets = rng.integers(0, 2**63, size=_HASHES, dtype=np.uint64)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for n, members in enumerate(sets):
        if members:
            signature = _minhash_signature(base[[index[word] for word in members]], factors, offsets)
            for band, part in enumerate(signature.reshape(_BANDS, -1)):
                buckets[band, part.tobytes()].append(n)
    result: dict[tuple[int, int], float] = {}
    for crowd in buckets.values():
        # Of equal sets, each is compared only with the first.
        pairs = combinations(crowd, 2) if len(crowd) <= _MAX_BUCKET else ((crowd[0], other) for other in crowd[1:])
        for a, b in pairs:
            if (a, b) not in result:
                result[a, b] = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
    return sorted((a, b, value) for (a, b), value in result.items() if value >= threshold)


def _minhash_signature(
    hashes: NDArray[np.uint64], factors: NDArray[np.uint64], offsets: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        mixed = hashes[:, None] * factors + offsets
        mixed ^= mixed >> np.uint64(29)
        lowest: NDArray[np.uint64] = mixed.min(axis=0)
    return lowest


def audit_duplicate_items(data: SplitDataset) -> Check:
    """Report items with equal or nearly equal titles, which a model cannot distinguish."""
    items = sorted(data.dataset.items)
    keys = [title_key(data.dataset.items[item].title) for item in items]
    equal: dict[str, list[str]] = defaultdict(list)
    for item, key in zip(items, keys, strict=True):
        equal[key].append(item)
    twins = sum(len(group) for group in equal.values() if len(group) > 1)
    shingles = [frozenset(key[i : i + 3] for i in range(max(1, len(key) - 2))) for key in keys]
    near = [(a, b, s) for a, b, s in find_near_duplicates(shingles, 0.85) if keys[a] != keys[b]]
    examples = tuple(
        f"{data.dataset.items[items[a]].title!r} and {data.dataset.items[items[b]].title!r}" for a, b, _ in near[:5]
    )
    result = (
        f"{twins} of {len(items):,} items share a title with another item; {len(near)} more pairs of titles are "
        "nearly equal"
    )
    figures = {"equal": float(twins), "near_pairs": float(len(near))}
    return Check("near-duplicate items", result, "notice" if twins or near else "clean", examples, figures)


def audit_duplicate_users(data: SplitDataset, split: str) -> Check:
    """Report evaluated users with a near-duplicate training user who chose the held-out item."""
    held = {h.user_id: h.item_id for h in data.holdouts(split)}  # type: ignore[arg-type]
    trained = {user: frozenset(e.item_id for e in data.train_events(user)) for user in data.users()}
    users = [user for user in data.users() if len(trained[user]) >= 3]
    # The training items of every user, for evaluated users with the held-out item added.
    sets = [trained[user] for user in users] + [trained[u] | {held[u]} for u in users if u in held]
    owners = users + [user for user in users if user in held]
    twins = set()
    for a, b, _ in find_near_duplicates(sets, 0.9):
        if a < len(users) <= b and owners[a] != owners[b] and held[owners[b]] in sets[a]:
            twins.add((owners[b], owners[a]))
    evaluated = sum(user in held for user in users)
    examples = tuple(f"held-out user {user} and user {twin}" for user, twin in sorted(twins)[:5])
    count = len({user for user, _ in twins})
    result = f"{count} of {evaluated:,} held-out users have a near-duplicate training user with the held-out item"
    return Check("near-duplicate users", result, "notice" if count else "clean", examples, {"users": float(count)})


# --------------------------------------------------------------------------- memorisation


def audit_memorisation(backend: Backend, data: SplitDataset, *, seed: int) -> Check:
    """Measure whether a model can complete catalogue titles from their first half (memorisation).

    Each prompt shows a few complete titles and the first words of another; a completion is correct if its letters and
    digits equal the rest of the title. The control permutes the second halves, so that no such title exists: it gives
    the chance level. (Di Palma et al., "Do LLMs Memorize Recommendation Datasets?", SIGIR 2025, ask for
    MovieLens-1M's records in the same spirit.)
    """
    name = f"memorisation of {data.dataset.name}"
    halves = _title_halves(data)
    if len(halves) < 2 * _SOLVED:
        return Check(name, "not tested: fewer than 8 titles have at least three words")
    rng = seeded_random("memorisation", seed, data.dataset.name)
    chosen = rng.sample(halves, min(_TITLES, len(halves)))
    tails = [tail for _, tail in chosen]
    mixed = tails[1:] + tails[:1]
    template = load_templates("probe")["recite"]
    rates = []
    for second in (tails, mixed):
        records = [(head, tail) for (head, _), tail in zip(chosen, second, strict=True)]
        prompts = [_completion_prompt(template, records, n, data.dataset.noun) for n in range(len(records))]
        completions = backend.generate(prompts, max_tokens=24)
        right = [title_key(done.text) == title_key(tail) for done, (_, tail) in zip(completions, records, strict=True)]
        rates.append(sum(right) / len(right))
    true, control = rates
    figures = {"completed": true, "control": control, "titles": float(len(chosen))}
    result = (
        f"the base model completes {true:.1%} of {len(chosen)} titles, and {control:.1%} of permuted titles (baseline)"
    )
    return Check(name, result, "notice" if true > control + 0.02 else "clean", (), figures)


def _title_halves(data: SplitDataset) -> list[tuple[str, str]]:
    results = []
    for _, item in sorted(data.dataset.items.items()):
        # A year or an edition in brackets is easy to complete, so it is removed.
        words = re.sub(r"\s*[(\[].*", "", item.title).split()
        if len(words) >= 3:
            cut = len(words) // 2
            results.append((" ".join(words[:cut]), " ".join(words[cut:])))
    return results


def _completion_prompt(template: Template, records: Sequence[tuple[str, str]], n: int, noun: str) -> Prompt:
    solved = [records[(n + k) % len(records)] for k in range(1, _SOLVED + 1)]
    values: list[dict[str, Any]] = [{"noun": noun, "head": head, "rest": rest} for head, rest in solved]
    prefix = [segment for value in values for part in template.step(value) for segment in part]
    opening = template.opening({"noun": noun, "head": records[n][0]})
    return Prompt(messages=template.turns({"noun": noun}), answer_prefix=(*prefix, *opening), stop=template.tail)
