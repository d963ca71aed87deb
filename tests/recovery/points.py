"""Points at which a process kills itself: a function, the number of the call, and where in that call."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

# Number of ranked requests: three parts of at most 64.
REQUESTS = 150

# Module, attribute, number of the last call, and whether the kill is before or after it, or cuts its file in half.
Point = tuple[str, str, int, str]

RUN: dict[str, Point] = {
    "mid-step": ("llmrec.train.sft", "LabelRowTrainer.compute_loss", 4, "after"),
    "mid-save, before the adapter": ("peft.peft_model", "PeftModel.save_pretrained", 2, "before"),
    "mid-save, before the optimiser": ("transformers.trainer", "Trainer._save_optimizer_and_scheduler", 2, "before"),
    "mid-save, before the random state": ("transformers.trainer", "Trainer._save_rng_state", 2, "before"),
    "mid-save, before the manifest": ("llmrec.train.sft", "write_manifest", 2, "before"),
    "between stages, before the merge": ("llmrec.pipeline.training", "_merge", 1, "before"),
    "between stages, before the record of training": ("llmrec.pipeline.training", "write_checked_json", 1, "before"),
    "between stages, after the merge": ("llmrec.pipeline.training", "write_checked_json", 2, "before"),
    "between stages, before evaluation": ("llmrec.pipeline.run", "Session.evaluation", 1, "before"),
    "mid-evaluation, before a chunk is stored": ("llmrec.backends.cache", "AnswerStore.put", 2, "before"),
    "mid-evaluation, after a chunk is stored": ("llmrec.backends.cache", "AnswerStore.put", 5, "after"),
    "mid-evaluation, while a row is written": ("llmrec.pipeline.evaluation", "write_checked_json", 14, "before"),
    "mid-report, before the results": ("llmrec.pipeline.results", "write_checked_json", 1, "before"),
    "mid-report, between two files": ("llmrec.report.page", "_write_if_changed", 3, "before"),
}

EXPORT: dict[str, Point] = {
    "mid-export, weights half written": ("shutil", "copyfile", 1, "half"),
    "mid-export, before the card": ("llmrec.exports.card_facts", "build_card", 1, "before"),
    "mid-export, before the checksums": ("llmrec.exports.export", "write_checksums", 1, "before"),
    "mid-export, before the rename": ("llmrec.exports.files", "_replace_folder", 1, "before"),
    "mid-export, after the rename": ("llmrec.exports.files", "_replace_folder", 1, "after"),
}

RANK: dict[str, Point] = {
    "mid-rank, before a batch is stored": ("llmrec.backends.cache", "AnswerStore.put", 20, "before"),
    "mid-rank, after a batch is stored": ("llmrec.backends.cache", "AnswerStore.put", 20, "after"),
    "mid-rank, before a part is stored": ("llmrec.answer.rank.run", "write_part", 2, "before"),
    "mid-rank, after a part is stored": ("llmrec.answer.rank.run", "write_part", 2, "after"),
    # Each record is written twice: to its part and to the output.
    "mid-rank, while the output is written": ("llmrec.data.ranked", "_json_line", REQUESTS + REQUESTS // 2, "before"),
    "mid-rank, before the summary": ("llmrec.answer.rank.run", "write_checked_json", 1, "before"),
    "mid-rank, before the parts are removed": ("llmrec.answer.rank.run", "write_checked_json", 1, "after"),
}

POINTS = {**RUN, **EXPORT, **RANK}


def arm(name: str) -> None:
    """Make this process kill itself at a named point."""
    module, path, last, side = POINTS[name]
    owner: Any = import_module(module)
    *outer, attribute = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    def fatal(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if calls == last:
            if side == "half":
                os.truncate(args[1], Path(args[1]).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, fatal)
