"""Compares llmrec's learned ranker with RecTools' two-stage model, over the same candidates of the same members.

``RECTOOLS_PYTHON=PYTHON LLMREC_DATA=FOLDER python -m eval.benchmarks.ranker eval/results/ranker.json``, where PYTHON is
the interpreter of an environment with ``rectools[catboost]`` and ``lightgbm``. Members have the parameters that a
committed result of a suite chose, and are fitted on training interactions once for both libraries. The second stage is
trained on the reserved validation users, and measured on all test users; seen items are filtered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.benchmarks.provenance import provenance
from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.validation import ranking_cases
from llmrec.data.split import SplitDataset, request_of, split_validation_users
from llmrec.durable import write_json
from llmrec.ensembles.base import Ensemble
from llmrec.ensembles.cells import (
    TOP_ITEMS_PER_MEMBER,
    CandidateScores,
    collect_candidate_scores,
    concatenate_blocks,
    select_candidates,
)
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.rankers import CatalogueMember
from llmrec.ensembles.weights import EnsembleTrial, feature_matrix, feature_names
from llmrec.metrics.ranking import ndcg
from llmrec.metrics.significance import sign_flip_test
from llmrec.metrics.stats import bootstrap_interval
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import load_suite
from llmrec.registry import BASELINES, import_component
from llmrec.types import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

CUT, RESAMPLES, BLOCK = 10, 2000, 512
TABLE = "excluded"
CHOSEN, LINEAR, RANKER = "llmrec", "llmrec, linear forms alone", "llmrec, ranker alone"
SINGLE = "best single member"


@dataclass(frozen=True)
class Source:
    """The members of an ensemble of a suite, with the parameters in its committed result.

    Attributes:
        suite: The name of the suite.
        row: The name of the ensemble.
        without: Members to leave out, since they take long to fit.
    """

    suite: str
    row: str
    without: tuple[str, ...] = ()


SOURCES = {
    "movielens-100k": Source("ml-100k", "ensemble of interactions and texts", ("sasrec",)),
    "amazon14-toys": Source("toys", "ensemble of interactions and texts"),
}


class SecondStage(Ensemble):
    """The second stage of an ensemble over stored candidates."""

    def measured(
        self, train: CandidateScores, users: Sequence[str], test: CandidateScores, only: EnsembleTrial | None = None
    ) -> Measured:
        """Fit and evaluate the second stage; a target that is not a candidate ranks below all candidates."""
        begin = time.process_time()
        self._choose(train, users, repeats=False, ablate=False, only=only)
        fitted_at = time.process_time()
        values = test.ndcg(self.fitted.scores(test))
        return Measured(values, fitted_at - begin, time.process_time() - fitted_at)


@dataclass(frozen=True)
class Measured:
    """NDCG@10 of each test user, and the processor seconds of the second stage."""

    values: NDArray[np.float64]
    fit: float
    answer: float


def members_of(source: Source, data: SplitDataset, seed: int) -> list[CatalogueMember]:
    """Return the fitted members."""
    suite = load_suite(f"eval/suites/{source.suite}.yaml")
    rows = json.loads(Path(f"eval/results/{source.suite}.json").read_text(encoding="utf-8"))["rows"]
    chosen = {row["name"]: row["tables"][TABLE]["parameters"] for row in rows if row["baseline"]}
    (ensemble,) = (row for row in suite.rows if row.label == source.row)
    members = []
    for name in ensemble.fuse:
        if name in source.without:
            continue
        (row,) = (row for row in suite.rows if row.label == name)
        assert row.baseline is not None
        model = fit_baseline(row.baseline, chosen[name], data, seed=seed)
        members.append(CatalogueMember(name, model, import_component(BASELINES, row.baseline, "baseline").SCORES))
    return members


def candidates(
    members: Sequence[CatalogueMember],
    cases: Sequence[Case],
    users: Mapping[str, int],
    context: ContextFeatures,
    folder: Path,
    which: str,
) -> tuple[CandidateScores, dict[str, NDArray[np.float64]]]:
    """Write the members' top items with scores, and llmrec's features of their union.

    Returns:
        The candidates, and NDCG@10 of each member and user.
    """
    items = members[0].scorer.items
    column = {item: index for index, item in enumerate(items)}
    codes, names, kinds = context.codes(items), [member.name for member in members], [m.kind for m in members]
    lists: list[list[list[NDArray[Any]]]] = [[[], [], []] for _ in members]
    pairs: list[tuple[NDArray[Any], NDArray[Any]]] = []
    cells: list[CandidateScores] = []
    values: list[list[NDArray[np.float64]]] = [[] for _ in members]
    for start in range(0, len(cases), BLOCK):
        part = cases[start : start + BLOCK]
        requests, here = [case.request for case in part], np.arange(len(part))
        owners = np.array([users[request.user_id] for request in requests], dtype=np.int32)
        truth = np.array([column[str(case.truth)] for case in part])
        out = np.zeros((len(part), len(items)), dtype=bool)
        for row, request in enumerate(requests):
            out[row, [column[event.item_id] for event in request.history if event.item_id in column]] = True
        # As in the metric, a seen item may be the target.
        out[here, truth] = False
        raw = [np.asarray(member.scorer.scores(requests), dtype=np.float32) for member in members]
        union = np.zeros_like(out)
        for index, scores in enumerate(raw):
            left = np.where(out, -np.inf, scores)
            target_score = left[here, truth][:, None]
            values[index].append(ndcg((left > target_score).sum(axis=1), (left == target_score).sum(axis=1), CUT))
            one = select_candidates([scores], out)
            rows, columns = np.nonzero(one)
            order = np.lexsort((-left[rows, columns], rows))
            rows, columns = rows[order], columns[order]
            union |= one
            for kept, new in zip(lists[index], (owners[rows], columns, left[rows, columns]), strict=True):
                kept.append(new)
        chosen = select_candidates(raw, out)
        assert (chosen == union).all()
        rows, columns = np.nonzero(chosen)
        known = context.features(requests, rows, codes[columns])
        cells.append(collect_candidate_scores(raw, chosen, np.zeros_like(out), truth, names, kinds, known))
        pairs.append((owners[rows], columns.astype(np.int32)))
    arrays = {
        f"{key}-{index}": np.concatenate(blocks)
        for index, member in enumerate(lists)
        for key, blocks in zip(("user_id", "item_id", "score"), member, strict=True)
    }
    np.savez(folder / f"lists-{which}.npz", names=np.array(names), **arrays)
    result = concatenate_blocks(cells)
    features = feature_names(result)
    owners, columns = (np.concatenate(blocks) for blocks in zip(*pairs, strict=True))
    np.savez(
        folder / f"features-{which}.npz",
        names=np.array(features),
        user_id=owners,
        item_id=columns,
        values=feature_matrix(result, features),
    )
    return result, {name: np.concatenate(blocks) for name, blocks in zip(names, values, strict=True)}


def peer(python: str, folder: Path, cases: Sequence[Case], users: Mapping[str, int], items: Sequence[str]) -> Any:
    """Run RecTools; return its results, and NDCG@10 of each test user with the best setting for each feature set."""
    script = Path(__file__).with_name("ranker_peer.py")
    subprocess.run([python, str(script), str(folder)], check=True)
    report = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    arrays = np.load(folder / "lists.npz")
    truth = {users[case.request.user_id]: items.index(str(case.truth)) for case in cases}
    row = {users[case.request.user_id]: index for index, case in enumerate(cases)}
    values = []
    for index in range(len(report["best"])):
        value = np.zeros(len(cases))
        for user, item, rank in zip(*(arrays[f"{k}-{index}"] for k in ("user_id", "item_id", "rank")), strict=True):
            if truth[user] == item:
                value[row[user]] = 1 / np.log2(rank + 1)
        values.append(value)
    return report, values


def measured(name: str, python: str, folder: Path) -> dict[str, Any]:
    """Evaluate both libraries on a data set."""
    source = SOURCES[name]
    suite = load_suite(f"eval/suites/{source.suite}.yaml")
    data = load_split(suite.data, suite.split_seeds[0])
    choosing, weighing = split_validation_users(data, suite.reserved)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.process_time()
    members = members_of(source, choosing, suite.seeds[0])
    fit = time.process_time() - begin
    cases = ranking_cases(weighing)
    test = [Case(request=request_of(data, held, "test"), truth=held.item_id) for held in data.holdouts("test")]
    users = {user: index for index, user in enumerate(sorted(data.train["user_id"].unique().to_list()))}
    items, context = members[0].scorer.items, ContextFeatures(data)
    column = {item: index for index, item in enumerate(items)}
    begin = time.process_time()
    here, valid = candidates(members, cases, users, context, folder, "valid")
    there, tested = candidates(members, test, users, context, folder, "test")
    seconds = time.process_time() - begin
    np.savez(
        folder / "events.npz",
        **{
            "train-users": np.array([users[str(user)] for user in data.train["user_id"]]),
            "train-items": np.array([column[str(item)] for item in data.train["item_id"]]),
            "targets-users": np.array([users[case.request.user_id] for case in cases]),
            "targets-items": np.array([column[str(case.truth)] for case in cases]),
            "test-users": np.array([users[case.request.user_id] for case in test]),
        },
    )
    ensembles = {
        label: SecondStage(name, [member.name for member in members], learns=label != LINEAR)
        for label in (CHOSEN, LINEAR, RANKER)
    }
    owners = [case.request.user_id for case in cases]
    rows = {label: ensembles[label].measured(here, owners, there) for label in (CHOSEN, LINEAR)}
    # The setting of the ranker was chosen above, even if the linear ensemble was better.
    (trees,) = (tried for tried in ensembles[CHOSEN].tried if tried.form == "ranker")
    rows[RANKER] = ensembles[RANKER].measured(here, owners, there, only=trees)
    single = max(valid, key=lambda member: valid[member].mean())
    rows[SINGLE] = Measured(tested[single], 0.0, 0.0)
    report, values = peer(python, folder, test, users, list(items))
    for setting, value in zip(report["best"], values, strict=True):
        rows[f"RecTools, {setting['features']}"] = Measured(value, setting["fit"], setting["answer"])
    forms = {label: {"form": ensemble.fitted.form} for label, ensemble in ensembles.items()}
    return {
        "users": len(test),
        "items": len(items),
        "training_users": len(cases),
        "members": {member.name: float(tested[member.name].mean()) for member in members},
        "single": single,
        "seconds": {"fit_of_members": fit, "their_answers_and_features": seconds},
        "candidates": {
            "of_each": TOP_ITEMS_PER_MEMBER,
            "mean": len(there.in_history) / len(test),
            "targets_among_them": len(there.hits) / len(test),
        },
        "rows": [
            {
                "name": label,
                **asdict(bootstrap_interval(row.values, resamples=RESAMPLES, seed=0)),
                "seconds": {"fit": row.fit, "answer": row.answer},
                **forms.get(label, {}),
                **({"tried": _tried(ensembles[label])} if label in ensembles else {}),
            }
            for label, row in rows.items()
        ],
        "pairs": [
            {"a": a, "b": b, **asdict(sign_flip_test(rows[a].values, rows[b].values, resamples=RESAMPLES, seed=0).at())}
            for a in (CHOSEN, RANKER)
            for b in rows
            if b not in (CHOSEN, RANKER)
        ],
        "peer": report,
    }


def _tried(ensemble: SecondStage) -> list[dict[str, Any]]:
    return [{"form": tried.form, "name": tried.name, "valid": tried.value} for tried in ensemble.tried]


def main(target: Path, names: Sequence[str]) -> None:
    """Measure and write."""
    python = os.environ.get("RECTOOLS_PYTHON")
    if not python:
        raise SystemExit(
            "name the interpreter of an environment with rectools[catboost] and lightgbm: RECTOOLS_PYTHON=PYTHON"
        )
    for name in names or SOURCES:
        new = measured(name, python, Path("runs/ranker") / name)
        result = json.loads(target.read_text(encoding="utf-8"))["data"] if target.is_file() else {}
        result[name] = new
        result[name] |= provenance()
        write_json(
            target,
            {
                "command": "RECTOOLS_PYTHON=PYTHON LLMREC_DATA=FOLDER OMP_NUM_THREADS=1 make bench NAME=ranker",
                "what": "second stages over the same candidates: NDCG@10 of all test users, seen items filtered",
                "seconds": "of the processor, one thread",
                "data": result,
            },
        )
        for row in result[name]["rows"]:
            sys.stdout.write(f"{name}: {row['name']} {row['value']:.4f}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
