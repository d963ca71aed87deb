"""An engine process without a model, which starts at once and ranks by id.

Its ``model`` is a JSON file that configures its start: ``{"seconds": 0.5}`` is slow, ``{"fails": true}`` and
``{"dies": true}`` fail, ``{"gpu": FILE}`` locks a GPU for one engine, ``{"full": true}`` fails to load weights.
The profile of a request is a command: ``sleep 0.5``, ``wait FILE`` until it exists, ``die``, ``defect`` or ``refuse``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import polars as pl
import pytest

from llmrec.answer.known import Histories, Items, KnownEntities
from llmrec.answer.opening import Models
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.recommender import AnnotatedAnswer, Kind, Question, Recommender
from llmrec.data.requests import RankRequest
from llmrec.errors import DataError, ModelError
from llmrec.machine import try_lock
from llmrec.serve import engine
from llmrec.serve import service as serving
from llmrec.serve.app import make_app
from llmrec.serve.gates import Auth
from llmrec.serve.service import Service, Settings
from llmrec.serve.store import ServiceStore
from llmrec.terminal import WarningKeys
from llmrec.types import Item, Ranking
from tests.serve.served import listening, wait_ready

PAST = Histories(
    users=pl.Series(["old"]),
    starts=np.array([0, 2]),
    items=pl.Series(["i0", "i1"]),
    ratings=np.array([4.0, np.nan]),
    times=np.array([1.0, 2.0]),
)
ITEMS = {f"i{n}": Item(item_id=f"i{n}", title=f"Item {n}") for n in range(8)}


@dataclass
class Model:
    """Ranks items in the order of the catalogue."""

    items: Items
    name: str = "fake"
    kind: Kind = "classic"
    verbs: tuple[str, ...] = ("rank",)
    strategies: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        return ",".join(self.items)

    def answer(
        self, requests: Sequence[RankRequest], question: Question, listener: object = None
    ) -> list[AnnotatedAnswer]:
        for request in requests:
            if request.profile.startswith("sleep "):
                time.sleep(float(request.profile.split()[1]))
            elif request.profile.startswith("wait "):
                while not Path(request.profile.removeprefix("wait ")).exists():
                    time.sleep(0.005)
            elif request.profile == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif request.profile == "defect":
                raise ValueError("defect")
            elif request.profile == "refuse":
                raise DataError("rejected", kind="bad-value")
        return [self._ranked(request, question.depth) for request in requests]

    def _ranked(self, request: RankRequest, depth: int) -> AnnotatedAnswer:
        pool = request.candidates or tuple(self.items.values())
        out = request.barred | ({past.item.item_id for past in request.history} if not request.candidates else set())
        items = [item for item in pool if item.item_id not in out][: depth or None]
        names = tuple(item.item_id for item in items)
        scores = tuple(float(-n) for n in range(len(items)))
        answer = Ranking(request_id=request.id, items=names, scores=scores)
        return AnnotatedAnswer(answer=answer, titles=tuple(item.title for item in items), notes=request.notes)


class FakeModels(Models):
    """One model, also for similar items and unknown users."""

    @property
    def popular(self) -> Recommender:
        return self.get()

    def similar(self, by: str) -> Recommender:
        return self.get()


def open_fake(options: RecommenderOptions, names: Sequence[str] = ()) -> Models:
    start = json.loads(Path(options.model).read_text(encoding="utf-8"))
    time.sleep(start.get("seconds", 0))
    if start.get("fails"):
        raise ModelError("the model cannot be loaded", kind="damaged")
    if start.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    items = Items(ITEMS)
    return FakeModels(opened={"fake": Model(items)}, items=items, data=None, scale=None, blank=cast(Any, None))


def load_weights(start: dict[str, Any], models: Models) -> bool:
    """Take the GPU until the process ends, and return whether there is one."""
    if start.get("full"):
        raise ModelError("the GPU is full", kind="exhausted")
    if (gpu := start.get("gpu")) is not None and not try_lock(os.open(gpu, os.O_CREAT | os.O_RDWR)):
        raise ModelError("another engine is on the GPU", kind="exhausted")
    return gpu is not None


def work(line: Connection, options: RecommenderOptions, names: Sequence[str], noted: WarningKeys) -> None:
    """Run in the engine process."""
    start = json.loads(Path(options.model).read_text(encoding="utf-8"))
    fakes = {
        "open_models": open_fake,
        "with_resolved_engine": lambda options: options,
        "load_language_models": partial(load_weights, start),
    }
    with mock.patch.multiple(engine, **fakes):
        engine._run_engine(line, options, names, noted)


# Engines are forked from a process that has imported everything, which saves seconds.
_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload([__name__])


def fake_engines(patch: pytest.MonkeyPatch) -> None:
    """Let services start fake engines."""
    patch.setattr(engine, "_run_engine", work)
    patch.setattr(engine, "multiprocessing", SimpleNamespace(get_context=lambda _: _FORKING))


def configure(folder: Path, **start: Any) -> RecommenderOptions:
    """Configure the start of the next engine."""
    (folder / "model.json").write_text(json.dumps(start), encoding="utf-8")
    return RecommenderOptions(model=str(folder / "model.json"))


@dataclass(frozen=True)
class Faked:
    """A service with a fake engine, and the folder that configures the next engine."""

    url: str
    service: Service
    folder: Path


@contextmanager
def faking(folder: Path, patch: pytest.MonkeyPatch, *, auth: Auth | None = None, **settings: Any) -> Iterator[Faked]:
    """Serve a fake engine over HTTP, and wait until it is ready."""
    fake_engines(patch)
    known = KnownEntities(ITEMS, PAST)
    patch.setattr("llmrec.serve.service.read_known_entities", lambda *_: known)
    options = Settings(options=configure(folder), **settings)
    store = ServiceStore.open(str(folder / "store.sqlite"), serving.STORE_WAIT_FRACTION * options.patience)
    service = Service(options, known, store)
    with listening(make_app(service, auth or Auth())) as (url,):
        wait_ready(url)
        yield Faked(url, service, folder)
