"""The five commands: their folders, expected outputs, and a check for other changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.faults.zygote import Child, Ended, Zygote
from llmrec.data.features import FeatureStore
from llmrec.durable import checked
from tests.recovery.kills import FAULTY, Chain, export_outcome, outcome, rank_outcome, request_lines

BYSTANDER, WORDS = "notes.txt", "Nobody may touch this.\n"
# Differences between two runs of one suite.
_SPENT = {"created", "command", "seconds", "machine"}

SUITE: Mapping[str, Any] = {
    "suite": "made",
    "description": "A made table.",
    "data": {"source": "made-reviews"},
    "seeds": [0, 1],
    "split_seeds": [0, 1],
    "bootstrap": 100,
    "rows": [
        {"baseline": "random"},
        {"baseline": "popularity"},
        {"baseline": "markov-1"},
        {"baseline": "item-knn", "grid": {"history": [5, 20]}},
        {"baseline": "als", "parameters": {"factors": 8, "iterations": 4}, "tune": False},
        {"baseline": "ease", "tune": False},
    ],
}


# Smaller settings than in the recovery tests, since commands run hundreds of times.
RUN = (
    *(
        "eval.users=6",
        "eval.batch=2",
        "tasks.explanation=null",
        "tasks.rating.baselines=[global-mean, user-mean, item-mean, user-item-bias]",
    ),
    *("tasks.sequential.baselines=[random, popularity, item-knn, markov-1]", "tasks.rating.strategies=[expected]"),
)
REQUESTS = 80


def augmented(model: Path) -> dict[str, Any]:
    """Return a recipe that generates texts about users and items."""
    return {
        "name": "toy",
        "model": {"name": str(model), "dtype": "float32"},
        "data": {
            "source": "made-reviews",
            "noun": "products",
            "split": {"kind": "prefix", "valid": 0.2, "test": 0.2},
        },
        "tasks": {"ctr": {}},
        "eval": {"backend": "hf", "batch": 4},
        "augment": {"limit": 40, "max_tokens": 8, "encoder": "chance", "factors": ["taste"]},
    }


@dataclass(frozen=True)
class Work:
    """One command in a folder.

    Attributes:
        name: Name of the command.
        needs: Required files, from the folder of all.
        makes: Its main output.
        done: Its exit status on success.
        words: The folder and the model -> arguments of ``llmrec``.
        found: The folder -> everything that must be equal, and the names of all files.
        inside: Whether other files may be in its output folder.
    """

    name: str
    needs: tuple[str, ...]
    makes: str
    done: int
    words: Callable[[Path, Path], list[str]]
    found: Callable[[Path], dict[str, Any]]
    inside: bool = False


def _chain(step: str) -> Callable[[Path, Path], list[str]]:
    return lambda folder, model: Chain(folder).command(step, model)


def _run(folder: Path, model: Path) -> list[str]:
    return [*_chain("run")(folder, model), *RUN]


def _requests() -> str:
    """Return requests in two parts, one request malformed."""
    lines = request_lines().splitlines()[:REQUESTS]
    asked = [json.loads(line) if n != FAULTY[0] else None for n, line in enumerate(lines, start=1)]
    short = [each and {**each, "history": each["history"][:1], "candidates": each["candidates"][:2]} for each in asked]
    return "".join(f"{json.dumps(each) if each else lines[0][:-20]}\n" for each in short)


def _suite(folder: Path, model: Path) -> list[str]:
    return ["eval", str(folder / "suite.yaml"), "--out", str(folder / "suite"), "--results", str(folder / "results")]


def _augment(folder: Path, model: Path) -> list[str]:
    return ["augment", str(folder / "toy.yaml"), "--out", str(folder / "store"), "--quiet"]


def _run_found(folder: Path) -> dict[str, Any]:
    return {**outcome(folder / "run"), "names": names(folder / "run")}


def _suite_found(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results" / "made.json").read_text(encoding="utf-8"))
    for row in results["rows"]:
        del row["seconds"], row["memory_gb"]
    kept = {key: value for key, value in results.items() if key not in _SPENT}
    # Trials are read only without a stored row, and otherwise not written again.
    rows = [path for path in sorted((folder / "suite" / "rows").iterdir()) if not path.name.endswith(".trials.json")]
    values = {path.name: checked(path.read_bytes())["values"] for path in rows}
    return {"results": kept, "values": values, "names": names(folder / "suite") + names(folder / "results")}


def _export_found(folder: Path) -> dict[str, Any]:
    return {**export_outcome(Chain(folder)), "names": names(folder / "films"), "run": digests(folder / "run")}


def _rank_found(folder: Path) -> dict[str, Any]:
    return {**rank_outcome(Chain(folder)), "films": digests(folder / "films")}


def _augment_found(folder: Path) -> dict[str, Any]:
    return {**store_found(folder / "store"), "names": _store_names(folder / "store")}


def store_found(place: Path) -> dict[str, Any]:
    """Return the contents of a feature store."""
    store = FeatureStore.open(place)
    found: dict[str, Any] = {"stamp": store.stamp}
    for kind in store.kinds:
        ids = store.ids(kind)
        vectors = hashlib.sha256(store.get(kind, ids)[0].tobytes()).hexdigest()
        seen = sorted((each, *pair) for each, pairs in store.seen_by(kind).items() for pair in pairs)
        found[kind] = {"ids": ids, "texts": store.texts(kind, ids), "vectors": vectors, "seen": seen}
    return found


def _store_names(place: Path) -> list[str]:
    # Versions have random names.
    current = (place / "current").read_text(encoding="utf-8").strip()
    return sorted(name.replace(current, "VERSION") for name in names(place))


WORKS: Mapping[str, Work] = {
    work.name: work
    for work in (
        Work("run", (), "run", 0, _run, _run_found, inside=True),
        Work("suite", ("suite.yaml",), "suite", 0, _suite, _suite_found, inside=True),
        Work("export", ("run",), "films", 0, _chain("export"), _export_found),
        Work("rank", ("films", "requests.jsonl"), "ranked.jsonl", 1, _chain("rank"), _rank_found),
        Work("augment", ("toy.yaml",), "store", 0, _augment, _augment_found),
    )
}


def names(folder: Path) -> list[str]:
    """Return the names of all files in a folder and its subfolders, except bystanders."""
    files = (path for path in folder.rglob("*") if not path.is_dir() and path.name != BYSTANDER)
    return sorted(str(path.relative_to(folder)) for path in files)


def digests(folder: Path) -> dict[str, str]:
    """Return a hash of each file in a folder and its subfolders, except locks, which readers may create."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class Told:
    """The output of a call.

    Attributes:
        ended: How it ended.
        text: Its output.
    """

    ended: Ended
    text: str

    @property
    def errors(self) -> list[str]:
        """The error lines."""
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    @property
    def traceback(self) -> bool:
        """Whether it has a traceback."""
        return "Traceback (most recent call last)" in self.text

    def refused(self, *places: str | Path) -> str:
        """Return the fault of a call that should have failed with one error message; empty: none.

        Args:
            places: The message must name one of them, if any.
        """
        if self.traceback:
            return "traceback: " + self.text.strip().splitlines()[-1][:200]
        if self.ended.status != 2 or len(self.errors) != 1:
            return f"exit status {self.ended.status}, {len(self.errors)} errors"
        if places and not any(str(place) in self.errors[0] for place in places):
            return f"names no place: {self.errors[0][:200]}"
        return ""


class Bench:
    """Folders, processes and the undisturbed results.

    Attributes:
        whole: The folder of the undisturbed commands.
        seconds: Processor time of each.
        expected: Results of each.
    """

    def __init__(self, place: Path, processes: Zygote) -> None:
        from tests.conftest import make_model

        self.place, self.processes = place, processes
        self.model = place / "model"
        if not (self.model / "config.json").is_file():
            make_model(self.model)
        self.whole = place / "whole"
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, Any]] = {}
        self._logs = 0
        shutil.rmtree(self.whole, ignore_errors=True)
        self.whole.mkdir(parents=True)
        (self.whole / "suite.yaml").write_text(json.dumps(SUITE), encoding="utf-8")
        (self.whole / "requests.jsonl").write_text(_requests(), encoding="utf-8")
        (self.whole / "toy.yaml").write_text(json.dumps(augmented(self.model)), encoding="utf-8")
        for work in WORKS.values():
            told = self.call(work.words(self.whole, self.model))
            if told.ended.status != work.done:
                raise SystemExit(f"{work.name} did not do its work: {told.text[-2000:]}")
            self.seconds[work.name] = told.ended.used
            self.expected[work.name] = work.found(self.whole)

    def folder(self, work: Work, *more: str) -> Path:
        """Return a new folder with bystanders, the required files of a command and further copies."""
        case = self.place / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        self.fill(case, work, *more)
        return case

    def fill(self, case: Path, work: Work, *more: str) -> None:
        """Put bystanders and copies into a folder."""
        (case / BYSTANDER).write_text(WORDS, encoding="utf-8")
        for name in (*work.needs, *more):
            source = self.whole / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, case / name)
        if work.inside:
            (case / work.makes).mkdir(exist_ok=True)
            (case / work.makes / BYSTANDER).write_text(WORDS, encoding="utf-8")

    def call(self, words: Sequence[str], **how: Any) -> Told:
        """Run one command."""
        return self.together([words], [how])[0]

    def together(self, commands: Sequence[Sequence[str]], how: Sequence[Mapping[str, Any]]) -> list[Told]:
        """Run commands in parallel."""
        logs = []
        for _ in commands:
            self._logs += 1
            logs.append(self.place / "logs" / f"{self._logs}.log")
            logs[-1].parent.mkdir(exist_ok=True)
            logs[-1].unlink(missing_ok=True)
        children = [
            Child(words=list(words), log=str(log), **more) for words, log, more in zip(commands, logs, how, strict=True)
        ]
        ended = self.processes.do(*children)
        texts = [log.read_text(encoding="utf-8", errors="replace") if log.is_file() else "" for log in logs]
        return [Told(each, text) for each, text in zip(ended, texts, strict=True)]

    def do(self, work: Work, folder: Path, **how: Any) -> Told:
        """Run a work's command in a folder."""
        return self.call(work.words(folder, self.model), **how)

    def finished(self, work: Work, folder: Path, **how: Any) -> str:
        """Run a command to its end, and return the fault; empty: none."""
        told = self.do(work, folder, **how)
        if told.traceback or told.ended.status != work.done:
            last = (told.text.strip().splitlines() or ["nothing"])[-1]
            return f"the command did not end well ({told.ended.status}): {last[:300]}"
        return self.different(work, folder)

    def different(self, work: Work, folder: Path) -> str:
        """Return the difference of a command's results to the expected ones; empty: none."""
        for place in [folder, *([folder / work.makes] if work.inside else [])]:
            if not (place / BYSTANDER).is_file() or (place / BYSTANDER).read_text(encoding="utf-8") != WORDS:
                return "a bystander was changed"
        try:
            found = work.found(folder)
        except Exception as error:  # unreadable results are not equal
            return f"{type(error).__name__}: {str(error)[:200]}"
        return ", ".join(key for key, value in self.expected[work.name].items() if found.get(key) != value)
