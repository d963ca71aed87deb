"""What a reader of the documentation has before them: ``python -m eval.benchmarks.docs_count REVISION TARGET.json``.

Counted at a revision and in the working tree: pages, words outside code, and words that are not the field's
(`tests.words`). Generated pages (docs/cli.md, eval/) are left out.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from llmrec.durable import write_json
from tests.words import ROOT, hits

LEFT_OUT = {"docs/cli.md"}
_CODE = re.compile(r"```.*?```|<!--.*?-->", re.DOTALL)


def pages(root: Path) -> list[Path]:
    """Return the pages that people write."""
    found = [root / "README.md", root / "CONTRIBUTING.md", *root.glob("docs/**/*.md")]
    return sorted(path for path in found if str(path.relative_to(root)) not in LEFT_OUT)


def counted(root: Path) -> dict[str, int]:
    """Count what stands in a checkout."""
    paths = pages(root)
    texts = [_CODE.sub(" ", path.read_text(encoding="utf-8")) for path in paths]
    return {
        "pages": len(texts),
        "words": sum(len(text.split()) for text in texts),
        "other_words": sum(1 for _ in hits(paths, root)),
    }


def main(revision: str, target: Path) -> None:
    """Count both and write them."""
    packed = subprocess.run(
        ["git", "archive", revision, "README.md", "CONTRIBUTING.md", "docs"], capture_output=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        before = counted(Path(folder))
    found = {
        "command": f"python -m eval.benchmarks.docs_count {revision} {target}",
        "before": before,
        "after": counted(ROOT),
    }
    write_json(target, found)
    sys.stdout.write(f"{found}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
