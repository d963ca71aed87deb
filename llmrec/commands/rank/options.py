"""What `llmrec rank` is asked for: what a recommender is, and the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answering.options import About, RecommenderOptions


@dataclass(frozen=True, kw_only=True)
class RankOptions(RecommenderOptions):
    """A file of requests, a file of ranked lists, and what ranks them."""

    requests: Annotated[
        Path,
        About(names=("--in",), help="Requests: .jsonl, .csv, .tsv (each also .gz) or .parquet; see docs/rank.md."),
    ]
    out: Annotated[Path, About(help="Rankings, in any of these formats.")]
    limit: Annotated[int | None, About(least=1, help="Rank the first so many requests only.")] = None
    restart: Annotated[bool, About(help="Drop what an earlier, killed run left.")] = False
    quiet: Annotated[bool, About(names=("--quiet", "-q"), help="Show no progress bars.")] = False

    @property
    def parts(self) -> Path:
        """Where finished parts wait."""
        return self.out.with_name(self.out.name + ".parts")

    @property
    def summary(self) -> Path:
        """Where the summary is written."""
        return self.out.with_name(self.out.name + ".summary.json")
