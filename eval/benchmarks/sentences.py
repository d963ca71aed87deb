"""Draws sentences of the documentation and the code, for readers who judge whether they are plain technical English.

``python -m eval.benchmarks.sentences draw SAMPLE.json`` draws 100 with a seed: from README and docs/, first lines of
docstrings, the help of options and settings, and error messages. Readers who know the field but not the project write a
list of classes, one of plain, awkward and private for each sentence. ``python -m eval.benchmarks.sentences join
SAMPLE.json READER.json READER.json eval/results/sentences.json`` counts and stores them. ``... count CHECKOUT`` prints
the numbers of pages and of visible words.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from docs.site.reference import MARK
from eval.benchmarks.figures.pages import COMMENT, FENCE, GENERATED
from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json

ROOT = Path(__file__).resolve().parents[2]
SEED = 20261202
SIZES = {"documentation": 52, "docstrings": 18, "help": 15, "messages": 15}
CLASSES = ("plain", "awkward", "private")
# Shorter texts are labels, not sentences.
_LEAST = 5


def main() -> None:
    """Draw a sample, or join the classes of two readers."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.sentences")
    what = parser.add_subparsers(dest="what", required=True)
    draw = what.add_parser("draw")
    draw.add_argument("sample", type=Path)
    join = what.add_parser("join")
    for name in ("sample", "first", "second", "target"):
        join.add_argument(name, type=Path)
    what.add_parser("count").add_argument("checkout", type=Path, nargs="?", default=ROOT)
    chosen = parser.parse_args()
    if chosen.what == "count":
        sys.stdout.write(f"{json.dumps(counts(chosen.checkout))}\n")
    elif chosen.what == "draw":
        write_json(chosen.sample, drawn())
    else:
        write_json(chosen.target, joined(chosen.sample, [chosen.first, chosen.second]))


def drawn() -> list[dict[str, str]]:
    """Return the sample: kind, file and sentence."""
    rng, result = random.Random(SEED), []
    kinds = {"documentation": documentation(), "docstrings": docstrings(), "help": helps(), "messages": messages()}
    for kind, sentences in kinds.items():
        for file, sentence in rng.sample(sorted(set(sentences)), SIZES[kind]):
            result.append({"kind": kind, "file": file, "sentence": sentence})
    return result


def joined(sample: Path, readers: list[Path]) -> dict[str, object]:
    """Return the sample with the class of each reader, and the counts."""
    rows = json.loads(sample.read_text(encoding="utf-8"))
    classes = [json.loads(reader.read_text(encoding="utf-8")) for reader in readers]
    for answers in classes:
        if len(answers) != len(rows) or not set(answers) <= set(CLASSES):
            raise SystemExit(f"a reader gives one of {', '.join(CLASSES)} for each of the {len(rows)} sentences")
    return {
        "command": "python -m eval.benchmarks.sentences join SAMPLE READER READER eval/results/sentences.json",
        "seed": SEED,
        **provenance(),
        "counts": [dict(Counter(answers)) for answers in classes],
        "sentences": [
            row | {"classes": list(pair)} for row, pair in zip(rows, zip(*classes, strict=True), strict=True)
        ],
    }


def counts(checkout: Path) -> dict[str, dict[str, int]]:
    """Return the numbers of pages and visible words: README, pages written by hand, and generated parts of pages."""

    def words(*texts: str) -> dict[str, int]:
        return {"pages": len(texts), "words": sum(len(COMMENT.sub("", text).split()) for text in texts)}

    parts = [path.read_text(encoding="utf-8").partition(MARK) for path in (checkout / "docs").rglob("*.md")]
    return {
        "README": words((checkout / "README.md").read_text(encoding="utf-8")),
        "docs": words(*(written for written, _, _ in parts)),
        "generated": words(*(generated for _, _, generated in parts if generated)),
    }


def documentation() -> Iterator[tuple[str, str]]:
    """Yield the sentences of README and docs/ that are written by hand."""
    for path in [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8").partition(MARK)[0]
        for pattern in (FENCE, GENERATED, COMMENT):
            text = pattern.sub("", text)
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        for line in text.splitlines():
            # A vertical bar in code does not end a cell.
            cells = re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line) if line.lstrip().startswith("|") else [line]
            for cell in cells:
                yield from _sentences(path, re.sub(r"^[\s>*#-]+(?:\d+\. )?", "", cell))


def _sentences(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z*`])", text.replace("**", "").strip()):
        if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= _LEAST:
            yield path.relative_to(ROOT).as_posix(), sentence.strip()


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "llmrec").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield the first lines of docstrings."""
    for path, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = text.partition("\n")[0]
                if len(first.split()) >= _LEAST:
                    yield path.relative_to(ROOT).as_posix(), first


def helps() -> Iterator[tuple[str, str]]:
    """Yield the help of options and the descriptions of settings."""
    for path, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("help", "description"):
                text = _written(node.value)
                if len(text.split()) >= _LEAST:
                    yield path.relative_to(ROOT).as_posix(), text


def messages() -> Iterator[tuple[str, str]]:
    """Yield the messages of errors, with ... for values."""
    for path, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = _written(node.exc.args[0])
                if len(re.findall(r"[A-Za-z]{2,}", text)) >= _LEAST:
                    yield path.relative_to(ROOT).as_posix(), text


def _written(node: ast.expr) -> str:
    """Return the text of a literal or formatted string, with ... for its values."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_written(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return ""


if __name__ == "__main__":
    main()
