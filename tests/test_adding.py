"""A metric and a baseline from outside: a file each and an entry in the registry, as a contributor would add them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llmrec.results import Results

BASELINE = '''
from llmrec.baselines.base import Catalogue, NoParameters, ScoredBaseline, counts, Log
import numpy as np


class Rare(ScoredBaseline[NoParameters, object]):
    """Ranks items by how few have chosen them."""

    name = "rare"
    Config = NoParameters

    def fit(self, data):
        self.catalogue = Catalogue.of(data)
        self._model = self
        self.chosen = counts(Log.of(data, self.catalogue), self.catalogue)

    def scores(self, requests):
        return np.tile(1.0 / (1.0 + self.chosen), (len(requests), 1))
'''
METRIC = '''
import numpy as np


def first_half(greater, tied, pool):
    """Whether the target is ranked in the first half of the candidates."""
    return ((tied > 0) & (greater + (tied + 1) / 2 <= pool / 2)).astype(np.float64)
'''
MAIN = """
import sys
from llmrec import registry
from llmrec.entries import BaselineEntry, MetricEntry

registry.BASELINES["rare"] = BaselineEntry("added_rare:Rare", ("sequential",))
registry.METRICS["TopHalf"] = MetricEntry(
    kind="ranking", about="share of targets in the first half", function="added_half:first_half"
)
from llmrec.cli.main import main

sys.argv[0] = "llmrec"
main()
"""


def test_a_metric_and_a_baseline_are_a_file_and_an_entry_each(tmp_path: Path) -> None:
    for name, text in (("added_rare", BASELINE), ("added_half", METRIC), ("added_main", MAIN)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        tmp_path / "added_main.py",
        "run",
        "recipes/made/classic.yaml",
        "--out",
        tmp_path / "run",
    ]
    overrides = ["tasks={sequential: {users: 20, baselines: [random, popularity, item-knn, markov-1, rare]}}"]
    done = subprocess.run([*map(str, command), *overrides], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = Results.model_validate_json((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    rows = {row.predictor: row.metrics for row in results.rows}
    assert "TopHalf" in rows["rare"] and 0 <= float(rows["rare"]["TopHalf"].value or 0) <= 1
    assert rows["popularity"]["TopHalf"].signature.startswith("TopHalf|gain:binary|")
    report = (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "rare" in report and "TopHalf" in report
