"""Common implementations of training: TRL's SFTTrainer with one example per target, and full logits."""

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

# TRL's examples per optimiser step if padded, and tokens of one packed sequence.
BATCH, PACKED = 8, 1024


def positions(row: TokenRow) -> list[TokenRow]:
    """Return one example per target line: everything before it is the prompt, and only the line has loss."""
    starts = [n for n in range(1, len(row.ids)) if row.labels[n] != IGNORED and row.ids[n - 1] in _ends(row)]
    stops = [*starts[1:], len(row.ids)]
    return [
        TokenRow(row.ids[:stop], (*[IGNORED] * start, *row.ids[start:stop]))
        for start, stop in zip(starts, stops, strict=True)
    ]


def _ends(row: TokenRow) -> frozenset[int]:
    """Return the end-of-line tokens: the last token of the sequence."""
    return frozenset(row.ids[-1:])


def trl_trainer(model: Any, tokenizer: Any, rows: Sequence[TokenRow], *, packing: bool, bf16: bool) -> Any:
    """Return a trainer for one epoch, with loss on completions only and a learning rate of 0."""
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
    """Return the steps and the tokens, including padding, of one pass over a trainer's data."""
    batches = list(trainer.get_train_dataloader())
    return {"steps": len(batches), "tokens": sum(batch["input_ids"].numel() for batch in batches)}


def mean_loss(model: Any, rows: Sequence[TokenRow]) -> float:
    """Return the mean loss over all targets from the model's logits, one example at a time."""
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
    """Collect the warnings of libraries."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    hf_logging.set_verbosity_warning()
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
        hf_logging.set_verbosity_error()


def loss_memory(way: str, tokens: int, share: float, vocabulary: int, width: int) -> None:
    """Print the peak memory of a loss and its gradient in this process, in megabytes.

    Args:
        way: ``full``: full logits, as with ``model(labels=...)``; ``label rows``: llmrec's loss.
        tokens: Tokens of the step.
        share: Share of the tokens with loss.
        vocabulary: Rows of the output layer, which is random and frozen.
        width: Dimension of the hidden states.
    """
    from llmrec.train.loss import _ChunkedCrossEntropy

    torch.manual_seed(0)
    head = torch.empty(vocabulary, width).normal_(0, 0.02)
    hidden = torch.randn(tokens, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.arange(tokens) >= int(tokens * share)] = IGNORED
    # The first product allocates the library's buffers.
    (hidden[:8] @ head[:8].T).sum().backward()
    hidden.grad = None
    before = peak(reset=True)
    labelled = labels != IGNORED
    if way == "full":
        logits = (hidden @ head.T).float()
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    else:
        loss = _ChunkedCrossEntropy.apply(hidden[labelled], head, labels[labelled])
    (loss / labelled.sum()).backward()
    after = peak(reset=False)
    norm = float(hidden.grad.norm())
    sys.stdout.write(f"{(after - before) / 1024} {float(loss.detach() / labelled.sum())} {norm}\n")


def peak(*, reset: bool) -> int:
    """Return the peak memory of this process in kilobytes; ``reset`` sets it to the current memory.

    ``getrusage`` is not used: a process inherits its value from the parent.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])
