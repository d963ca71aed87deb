"""The usual ways of training: TRL's SFTTrainer on a row a position, and logits of every token."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging as hf_logging
from trl import SFTConfig, SFTTrainer

from llmrec.backends.encode import IGNORED, TokenRow

# TRL's rows in one optimiser step where they are padded, and the tokens of one packed row where they are not.
BATCH, PACKED = 8, 1024


def positions(row: TokenRow) -> list[TokenRow]:
    """Return a row a target line: everything before the line as prompt, and the line alone with loss."""
    starts = [n for n in range(1, len(row.ids)) if row.labels[n] != IGNORED and row.ids[n - 1] in _ends(row)]
    stops = [*starts[1:], len(row.ids)]
    return [
        TokenRow(row.ids[:stop], (*[IGNORED] * start, *row.ids[start:stop]))
        for start, stop in zip(starts, stops, strict=True)
    ]


def _ends(row: TokenRow) -> frozenset[int]:
    """Return the tokens that end a line: the row's last token, which is that of the last line."""
    return frozenset(row.ids[-1:])


def trl_trainer(model: Any, tokenizer: Any, rows: Sequence[TokenRow], *, packing: bool, bf16: bool) -> Any:
    """Return a trainer that goes over the rows once, with loss on completions alone and a learning rate of 0."""
    data = [
        {"input_ids": list(row.ids), "completion_mask": [int(label != IGNORED) for label in row.labels]} for row in rows
    ]
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_length=PACKED,
        packing=packing,
        per_device_train_batch_size=1 if packing else BATCH,
        num_train_epochs=1,
        learning_rate=0.0,
        completion_only_loss=True,
        bf16=bf16,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def work(trainer: Any) -> dict[str, int]:
    """Return what one pass over a trainer's data computes: steps, and tokens with padding."""
    batches = list(trainer.get_train_dataloader())
    return {"steps": len(batches), "tokens": sum(batch["input_ids"].numel() for batch in batches)}


def mean_loss(model: Any, rows: Sequence[TokenRow]) -> float:
    """Return the mean loss over all targets from the model's own logits, one row at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row.ids]), torch.tensor(row.labels[1:])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            count += row.targets
    return total / count


@contextmanager
def warnings_of(*names: str) -> Iterator[list[str]]:
    """Collect what libraries warn of."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    hf_logging.set_verbosity_warning()
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield found
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
        hf_logging.set_verbosity_error()


def loss_memory(way: str, tokens: int, share: float, vocabulary: int, width: int) -> None:
    """Print by how many megabytes a loss and its gradient lift the peak of this process's memory.

    Args:
        way: ``full``: logits of every token, as ``model(labels=...)`` has them; ``label rows``: ours.
        tokens: Tokens of the step.
        share: Share of the tokens that bear loss.
        vocabulary: Rows of the head, which is made of random numbers and frozen.
        width: Of the hidden states.
    """
    from llmrec.train.loss import _HeadLoss

    torch.manual_seed(0)
    head = torch.empty(vocabulary, width).normal_(0, 0.02)
    hidden = torch.randn(tokens, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.arange(tokens) >= int(tokens * share)] = IGNORED
    # The first product sets up the library's own buffers.
    (hidden[:8] @ head[:8].T).sum().backward()
    hidden.grad = None
    before = peak(reset=True)
    wanted = labels != IGNORED
    if way == "full":
        logits = (hidden @ head.T).float()
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    else:
        loss = _HeadLoss.apply(hidden[wanted], head, labels[wanted])
    (loss / wanted.sum()).backward()
    after = peak(reset=False)
    norm = float(hidden.grad.norm())
    sys.stdout.write(f"{(after - before) / 1024} {float(loss.detach() / wanted.sum())} {norm}\n")


def peak(*, reset: bool) -> int:
    """Return the peak of this process's memory in kilobytes; ``reset`` makes it what is held now.

    The figure of ``getrusage`` would not do: a process inherits it from the one that started it.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])
