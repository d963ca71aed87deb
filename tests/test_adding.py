"""A new metric and a new baseline: a file each and an entry in the registry, as a contributor would add them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llmrec.results import Results

BASELINE = '''
from llmrec.baselines.base import Catalogue, NoParameters, ScoredBaseline, item_counts, InteractionLog
import numpy as np


class Rare(ScoredBaseline[NoParameters, object]):
    """Ranks items by how few have chosen them."""

    name = "rare"
    Config = NoParameters

    def fit(self, data):
        self.catalogue = Catalogue.of(data)
        self._model = self
        self.chosen = item_counts(InteractionLog.of(data, self.catalogue), self.catalogue)

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


def test_metric_and_baseline_are_a_file_and_an_entry_each(tmp_path: Path) -> None:
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


INSTALLED = """
from llmrec.entries import MetricEntry

FIRST = MetricEntry(kind="ranking", about="whether the first item is relevant", several="acme_first:first", cut=True)


def first(judged, k):
    values = judged.total * 0.0
    values[judged.request[judged.greater == 0]] = 1.0
    return values
"""


def test_metric_of_an_installed_package(tmp_path: Path) -> None:
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llmrec.metrics]\nFirst = acme_first:FIRST\nLost = acme_first:NONE\n")
    (tmp_path / "acme_first.py").write_text(INSTALLED, encoding="utf-8")
    code = """
import llmrec
lists, truth = {"u": ["a", "b"], "v": ["b"]}, {"u": "a", "v": "c"}
print(llmrec.metrics.first(lists, truth), llmrec.metrics.first.per_user(lists, truth))
rows = [{"user": user, "item": item} for user, items in lists.items() for item in items]
print(llmrec.score(rows, [{"user": "u", "item": "a"}], k=(2,), resamples=10).metrics["First@2"].value)
"""
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout == "0.5 {'u': 1.0, 'v': 0.0}\n1.0\n", done.stderr
    assert "the metric Lost is not computed" in done.stderr
