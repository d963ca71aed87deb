"""The words of docs, docstrings, comments and messages: ``python -m tests.words``, in ``make lint``.

The field has terms for what this project does, and a reader should not have to learn others. Prose is read: Markdown
without its code, and of Python modules the docstrings, the comments and the strings that hold a sentence. A word of the
list is an error; ``--count`` counts them file by file.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

BETTER = {
    r"from chance": "from scratch (randomly initialised)",
    r"(above|below) chance": "better or worse than a random ranking",
    r"counting (alone|and|beside|has|is|of transitions|rows?)|(with|beside|and|than) counting": (
        "Markov and co-occurrence baselines"
    ),
    r"(?<![.=\'])arms?(?![=:\'])(?! BF16)": "settings (zero-shot, few-shot, tuned)",
    r"forwards(?!:)": "forward passes",
    r"a (row|line) a user": "one training sequence per user",
    r"a (row|line) a position": "one example per target",
    r"made (data|reviews|shop|table|set|texts?)": "synthetic",
    r"mend(s|ed|ing)?(?!:)": "fix",
    r"(goes|went) on (where|from)|killed \w+ (goes|go|went) on": "resumes, continues",
    r"(the )?histor(y|ies) (is |are )?(included|excluded)": "seen items filtered / not filtered",
    r"items of the history (are |is |left out|excluded|included)": "seen items",
    r"(is|are|not) (shown|contradicted)( to be)? (better|worse)|contradicted|not shown to": (
        "significantly better, no significant difference, significantly worse"
    ),
    r"of late": "recent",
    r"what (\w+ ){1,4}(is|are) worth": "what it adds, its weight",
    r"what stands beside what": "neighbours",
    r"one's own": "custom, your own",
    r"(wins|won) never": "never wins",
    r"the number is the number": "say what is guaranteed",
    r"a page an? \w+|a row an? (item|user|case|request|run|model|line)|a line an? (item|user|case|request|run|model)": (
        "one page per ..., one row per ..."
    ),
}
"""What is not said (a regular expression of whole words), and what is said in its place."""

WHERE = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "eval/*.md", "llmrec/**/*.py", "llmrec/**/*.j2")
"""Whose prose is looked at."""
EXCEPT = ("docs/cli.md", "CHANGELOG.md", "eval/LEADERBOARD.md")
"""Pages that are made from others, hold names of rows that stored results have, or tell of former words."""

_WORDS = re.compile("|".join(f"(?P<w{place}>\\b(?:{word})\\b)" for place, word in enumerate(BETTER)), re.IGNORECASE)
_CODE = re.compile(
    r"```.*?```|~~~.*?~~~|``.+?``|`[^`\n]*`|<!--.*?-->|<[a-z/][^<>]*>|--mend\b|{%.*?%}|{{.*?}}|{#.*?#}|\]\([^)]*\)",
    re.DOTALL,
)


class Hit(NamedTuple):
    """One word that is not of the field."""

    path: str
    line: int
    said: str
    better: str


def hits(paths: Iterable[Path], root: Path = ROOT) -> Iterator[Hit]:
    """Yield every word of the list that prose of ``paths`` uses."""
    better = list(BETTER.values())
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for first, prose in _python(text) if path.suffix == ".py" else [(1, _blank(text))]:
            for found in _WORDS.finditer(prose):
                line = first + prose.count("\n", 0, found.start())
                kind = int((found.lastgroup or "w0")[1:])
                yield Hit(str(path.relative_to(root)), line, " ".join(found.group().split()), better[kind])


def pages() -> list[Path]:
    """Return the files whose prose is looked at."""
    return sorted({path for pattern in WHERE for path in ROOT.glob(pattern)} - {ROOT / name for name in EXCEPT})


def _blank(text: str) -> str:
    """Return ``text`` with its code blotted out, lines kept."""
    return _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code.group()), text)


def _python(text: str) -> Iterator[tuple[int, str]]:
    """Yield the prose of a module, with the line on which each piece begins."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], _blank(token.string)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, _blank(node.value)


def main(arguments: list[str]) -> int:
    """Print the hits, or with ``--count`` how many there are a file; 1 if there is one."""
    found = list(hits(pages()))
    if "--count" in arguments:
        for path, times in Counter(hit.path for hit in found).most_common():
            sys.stdout.write(f"{times:5} {path}\n")
    else:
        for hit in found:
            sys.stdout.write(f'{hit.path}:{hit.line}: "{hit.said}"; say: {hit.better}\n')
    sys.stdout.write(f"words: {len(found)} hits in {len({hit.path for hit in found})} files\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
