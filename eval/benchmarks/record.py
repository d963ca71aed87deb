"""Keeps a run's results in the repository: ``make record`` after ``make quickstart``.

``python -m eval.benchmarks.record RUN TARGET`` writes them without prompts, texts and raw answers, which hold other
people's data; with a README as third argument its table of the quickstart too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

START, END = "<!-- quickstart:table -->", "<!-- /quickstart:table -->"
LOWER = ("RMSE", "MAE")


def main(run: Path, target: Path, readme: Path | None = None) -> None:
    """Write the results, and the table where there is a README."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    results["examples"] = []
    results.pop("texts", None)
    for row in results["rows"]:
        row["failures"] = []
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if readme is None:
        return
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n\n{table(results)}\n\n{END}{after}", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """One line a task, for its first strategy; baselines best first."""
    lines = [
        "| Task, metric, cases | Zero-shot | Few-shot | Tuned | Tuned − zero-shot | Baselines |",
        "|---|---|---|---|---|---|",
    ]
    for task, metric in results["headline"].items():
        rows = [row for row in results["rows"] if row["task"] == task]
        first = next(row["predictor"] for row in rows if row["arm"] != "baseline")
        arms = {row["arm"]: row for row in rows if row["predictor"] == first}
        value = {arm: f"{row['metrics'][metric]['value']:.3f}" for arm, row in arms.items()}
        pair = next(
            c for c in results["comparisons"] if (c["a"], c["b"]) == (arms["tuned"]["id"], arms["zero-shot"]["id"])
        )
        classic = sorted(
            ((row["metrics"][metric]["value"], row["predictor"]) for row in rows if row["arm"] == "baseline"),
            reverse=metric not in LOWER,
        )
        better = "lower is better" if metric in LOWER else "higher is better"
        difference = f"{pair['value']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}], {pair['verdict']}"
        cells = [
            f"{task}, {metric} ({better}), {rows[0]['n']}",
            *(value.get(arm, "–") for arm in ("zero-shot", "few-shot", "tuned")),
            difference.replace("-", "−"),
            ", ".join(f"{name} {number:.3f}" for number, name in classic),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machine = results["machine"]
    stages = ", ".join(f"{entry['stage']} {entry['seconds']:.0f} s" for entry in results["budget"])
    lines += [
        "",
        f"Strategies: expected rating, title likelihood, label distribution, generated text. Ranking over "
        f"{results['candidates']['main']['count']} stored candidates; one training seed; 95 % intervals of single "
        f"differences, verdicts Holm-adjusted over all {len(results['comparisons'])} comparisons of the run. "
        f"{machine['cores']} cores ({machine['cpu']}), {machine['gpu'] or 'no GPU'}. Seconds, after the set-up: "
        f"{stages}; {results['seconds']:.0f} s in all.",
        *(f"\n{note}" for note in results["notes"] if "no real reviews" in note),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
