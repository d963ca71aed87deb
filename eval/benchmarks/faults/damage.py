"""Cases with a damaged file: a flipped bit or truncation, at twenty positions per kind of file.

Each must be rejected with an error that names the file, or recomputed with equal results. A successful call with
different results is a silent failure.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.faults.stops import Case
from eval.benchmarks.faults.works import WORKS, Bench, Told, digests
from llmrec.durable import checked

OFFSETS = 20
_CUT = 4
"""Interval of the cases that truncate the file instead of flipping a bit."""
# A suite with one model that reads a store or stores a fit.
_ROWS = {
    "store": [{"baseline": "content", "parameters": {"encoder": "store:{store}"}, "tune": False}],
    "fits": [{"baseline": "ease", "tune": False}, {"baseline": "als", "parameters": {"factors": 8}, "tune": False}],
}


@dataclass(frozen=True)
class Kind:
    """A kind of stored file.

    Attributes:
        name: Name of the kind.
        state: Writes a valid state into a new folder, with the files that may be damaged.
        files: The folder -> these files.
        call: The command that reads them.
        found: Its results, to compare.
    """

    name: str
    state: Callable[[Bench], Path]
    files: Callable[[Path], list[Path]]
    call: Callable[[Bench, Path], Told]
    found: Callable[[Path], Any]


def damage(seed: int) -> Iterator[Case]:
    """Damage every kind of file at twenty positions."""
    for place in range(OFFSETS):
        for kind in KINDS:
            yield Case("damage", f"{kind.name} {place}", _Damaged(kind, place, seed), {"of": kind.name})


@dataclass(frozen=True)
class _Damaged:
    kind: Kind
    place: int
    seed: int

    def __call__(self, bench: Bench) -> tuple[str, dict[str, Any]]:
        kind = self.kind
        expected = _sound(bench, kind)
        folder = kind.state(bench)
        files = sorted(kind.files(folder))
        draw = random.Random(f"{self.seed} {kind.name} {self.place}")
        file = files[self.place % len(files)]
        at = int(file.stat().st_size * (self.place + draw.random()) / OFFSETS)
        content = bytearray(file.read_bytes())
        if self.place % _CUT == _CUT - 1:
            content = content[:at]
        else:
            # Low bits, which change digits into other digits.
            content[at] ^= 1 << draw.randrange(3)
        file.write_bytes(content)
        facts: dict[str, Any] = {"file": str(file.relative_to(folder)), "at": at, "cut": self.place % _CUT == _CUT - 1}
        told = kind.call(bench, folder)
        if told.ended.status in (0, 1) and not told.traceback:
            try:
                same = kind.found(folder) == expected
            except Exception as error:  # unreadable results are not equal
                return f"{type(error).__name__}: {str(error)[:200]}", facts
            return ("" if same else "silent: it ended well with other figures"), {**facts, "became": "made again"}
        # An error may name the file or its folder.
        own = [file, file.parent, *[each for each in file.parents if each.parent == folder]]
        wrong = told.refused(*own)
        return wrong, {**facts, "became": "refused", "said": told.errors[:1]}


def _sound(bench: Bench, kind: Kind) -> Any:
    """Return the results of an undamaged state, computed once."""
    known = bench.expected.setdefault("damage", {})
    if kind.name not in known:
        folder = kind.state(bench)
        told = kind.call(bench, folder)
        if told.ended.status not in (0, 1) or told.traceback:
            raise SystemExit(f"{kind.name}: a valid state cannot be read: {told.text[-2000:]}")
        known[kind.name] = kind.found(folder)
    return known[kind.name]


# --------------------------------------------------------------------------- states


def _finished(bench: Bench) -> Path:
    return bench.folder(WORKS["run"], "run")


def _unanswered(bench: Bench) -> Path:
    """A run with stored answers and without stored rows."""
    folder = _finished(bench)
    shutil.rmtree(folder / "run" / "rows")
    return folder


def _stopped(bench: Bench, work: str, point: str) -> Path:
    """A command that was killed at a point; created once, then copied."""
    kept = bench.place / f"stopped-{work}"
    if not kept.is_dir():
        folder = bench.folder(WORKS[work])
        told = bench.do(WORKS[work], folder, point=point)
        if not told.ended.killed:
            raise SystemExit(f"{work} was not killed at {point}: {told.text[-2000:]}")
        shutil.copytree(folder, kept)
    folder = bench.place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    # Paths in a recipe and in a key are those of the first folder.
    return folder


def _suite_of(bench: Bench, rows: str) -> Path:
    folder = bench.folder(WORKS["suite"], *(["store", "toy.yaml"] if rows == "store" else []))
    page: dict[str, Any] = json.loads((folder / "suite.yaml").read_text(encoding="utf-8"))
    if rows == "store":
        page |= {"data": json.loads((folder / "toy.yaml").read_text(encoding="utf-8"))["data"], "split_seeds": [0]}
    page["rows"] = json.loads(json.dumps(_ROWS[rows]).replace("{store}", str(folder / "store")))
    (folder / "suite.yaml").write_text(json.dumps(page), encoding="utf-8")
    return folder


def _suite_done(bench: Bench) -> Path:
    return bench.folder(WORKS["suite"], "suite")


def _stored(bench: Bench) -> Path:
    return _suite_of(bench, "store")


def _kept(bench: Bench) -> Path:
    """A suite that was run and has stored fits but no results."""
    folder = _suite_of(bench, "fits")
    cache = bench.place / "cache"
    if not cache.is_dir():
        bench.do(WORKS["suite"], folder, **_keeping(cache))
        shutil.rmtree(folder / "suite" / "rows")
    shutil.copytree(cache, folder / "cache")
    return folder


def _keeping(cache: Path) -> dict[str, Any]:
    return {"env": {"LLMREC_CACHE": str(cache), "LLMREC_FITS": "1"}, "keeps": True}


# --------------------------------------------------------------------------- what is read and given


def _again(work: str) -> Callable[[Bench, Path], Told]:
    return lambda bench, folder: bench.do(WORKS[work], folder)


def _trained(bench: Bench, folder: Path) -> Told:
    words = WORKS["run"].words(folder, bench.model)
    return bench.call(["train", *words[1:]])


def _reported(bench: Bench, folder: Path) -> Told:
    shutil.rmtree(folder / "run" / "report", ignore_errors=True)
    return bench.call(["report", str(folder / "run")])


def _exported(bench: Bench, folder: Path) -> Told:
    return bench.do(WORKS["export"], folder)


def _with_fits(bench: Bench, folder: Path) -> Told:
    return bench.do(WORKS["suite"], folder, **_keeping(folder / "cache"))


def _report(folder: Path) -> Mapping[str, str]:
    return digests(folder / "run" / "report")


def _weights(folder: Path) -> Mapping[str, Any]:
    record = checked((folder / "run" / "train.json").read_bytes())
    log = [json.loads(line) for line in (folder / "run" / "train_log.jsonl").read_text().splitlines()]
    told = {name: record[name] for name in ("adapter_sha256", "merged_sha256", "steps", "tokens", "target_tokens")}
    return {**told, "log": [(line["step"], line["loss"], line["valid_loss"]) for line in log]}


def _suite_figures(folder: Path) -> Any:
    results = json.loads((folder / "results" / "made.json").read_text(encoding="utf-8"))
    return [(row["name"], row["tables"]) for row in results["rows"]]


def _run_figures(folder: Path) -> Any:
    # A damaged database is renamed and kept.
    return {name: found for name, found in WORKS["run"].found(folder).items() if name != "names"}


def _within(*patterns: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _films(folder: Path) -> Any:
    return [digests(folder / "films")[name] for name in ("model.safetensors", "tokenizer.json", "items.parquet")]


_MERGED = ("run/merged/*.safetensors", "run/merged/*.json", "run/train.json")
_ADAPTER = ("run/adapter/*.safetensors", "run/merged/*.json", "run/train.json")

KINDS = (
    Kind("stored answers", _unanswered, _within("run/answers.sqlite"), _again("run"), _run_figures),
    Kind("rows of a run", _finished, _within("run/rows/*.json"), _again("run"), _run_figures),
    Kind("candidate files", _finished, _within("run/candidates/*.parquet"), _again("run"), _run_figures),
    Kind(
        "checkpoints",
        lambda bench: _stopped(bench, "run", "mid-save, before the manifest"),
        _within("run/checkpoints/checkpoint-2/*"),
        _trained,
        _weights,
    ),
    Kind(
        "adapter and merged model, trained on",
        _finished,
        _within(*_MERGED),
        _again("run"),
        WORKS["run"].found,
    ),
    Kind(
        "adapter and merged model, exported",
        _finished,
        _within(*_ADAPTER),
        _exported,
        _films,
    ),
    Kind("predictions.parquet", _finished, _within("run/predictions.parquet"), _reported, _report),
    Kind("results.json and audit.json", _finished, _within("run/results.json", "run/audit.json"), _reported, _report),
    Kind(
        "rows of a suite",
        _suite_done,
        _within("suite/rows/*.json"),
        _again("suite"),
        WORKS["suite"].found,
    ),
    Kind(
        "feature stores",
        _stored,
        _within("store/current", "store/*/*"),
        _again("suite"),
        _suite_figures,
    ),
    Kind("kept fits", _kept, _within("cache/fits/*"), _with_fits, _suite_figures),
    Kind(
        "parts of a ranking",
        lambda bench: _stopped(bench, "rank", "mid-rank, after a part is stored"),
        _within("ranked.jsonl.parts/part-*"),
        _again("rank"),
        lambda folder: WORKS["rank"].found(folder)["rows"],
    ),
    Kind(
        "exports",
        lambda bench: bench.folder(WORKS["rank"]),
        lambda folder: [path for path in _within("films/*")(folder) if path.suffix != ".md"],
        _again("rank"),
        lambda folder: WORKS["rank"].found(folder)["rows"],
    ),
)
"""The kinds of files."""
