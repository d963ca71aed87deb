"""Prepares ``eval/suites/unisrec-transfer.yaml``: UniSRec weights pretrained on Beauty, and samples of Toys' users.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.unisrec_start`` trains on the training part of FOLDER/amazon14_beauty
with the two contrastive losses, as in Hou et al. (KDD 2022), and writes the weights to ``runs/unisrec/beauty``. It also
writes ``toys-1`` and ``toys-10``: the sequences of 1 % and 10 % of the users of FOLDER/amazon14_toys, nested samples by
a hash. ``--share 0.01`` trains on 1 % of the users of Beauty, as a test.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llmrec.data.hashing import hash64
from llmrec.data.sets.table import load_data
from llmrec.data.split import split_dataset
from llmrec.durable import write_text
from llmrec.recipe.schema import DataSection, Split
from llmrec.systems.unisrec.baseline import UniSRec

TARGET, ENCODER = Path("runs/unisrec"), "all-MiniLM-L6-v2"


def some_users(source: Path, share: float, folder: Path) -> int:
    """Write the sequences of a share of the users of a data set, and return the number of users."""
    with gzip.open(source / "sequences.txt.gz", "rt", encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    drawn = hash64("share of users", 0, [line.split(" ", 1)[0] for line in lines])
    kept = [line for line, number in zip(lines, drawn.tolist(), strict=True) if number < share * 2**64]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "sequences.txt", "\n".join(kept) + "\n")
    shutil.copyfile(source / "items.tsv.gz", folder / "items.tsv.gz")
    return len(kept)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write the weights and sequences."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.unisrec_start")
    parser.add_argument("--epochs", type=int, default=30, help="epochs over the sequences of Beauty")
    parser.add_argument("--share", type=float, default=1.0, help="share of the users of Beauty")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    home = Path(os.environ.get("LLMREC_DATA", "."))
    for percent in (1, 10):
        count = some_users(home / "amazon14_toys", percent / 100, options.out / f"toys-{percent}")
        sys.stdout.write(f"{options.out / f'toys-{percent}'}: {count} users\n")
    beauty = home / "amazon14_beauty"
    if options.share < 1:
        beauty = options.out / "source"
        some_users(home / "amazon14_beauty", options.share, beauty)
    data = split_dataset(load_data(DataSection(source="sequences", path=str(beauty)), seed=0), Split(), seed=0)
    begin = time.process_time()
    teacher = UniSRec(UniSRec.Config(encoder=ENCODER, pretrain=options.epochs), seed=0)
    teacher.pretrained(data)
    teacher.save(options.out / "beauty", data)
    took = time.process_time() - begin
    sys.stdout.write(f"{options.out / 'beauty'}: {options.epochs} epochs of {len(data.users())} users, {took:.0f} s\n")


if __name__ == "__main__":
    main()
