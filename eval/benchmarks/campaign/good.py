"""Minimal valid inputs."""

from __future__ import annotations

import json
from typing import Any

USERS, ITEMS = 12, 15
EVENTS: list[dict[str, Any]] = [
    {
        "user_id": f"u{user}",
        "item_id": f"i{(user * 4 + step * 2) % ITEMS}",
        "rating": float(1 + (user + 2 * step) % 5),
        "timestamp": 1_700_000_000 + 1000 * user + step,
        "title": f"Film {(user * 4 + step * 2) % ITEMS}",
    }
    for user in range(USERS)
    for step in range(8)
]
EVENT_LINES = [",".join(EVENTS[0]), *(",".join(map(str, event.values())) for event in EVENTS)]
ITEM_LINES = ["item_id,title,genres", *(f"i{n},Film {n},Drama" for n in range(ITEMS))]

_SMALL: dict[str, Any] = {"users": 5, "history": 4}
RECIPES: tuple[dict[str, Any], ...] = (
    {
        "name": "tiny",
        "seed": 0,
        "model": {"name": "model", "max_length": 512, "dtype": "float32"},
        "data": {"source": "table", "path": "events.csv", "items": "items.csv", "noun": "films"},
        "tasks": {
            "rating": {
                **_SMALL,
                "templates": ["list-ratings"],
                "baselines": ["global-mean", "user-mean", "item-mean", "user-item-bias"],
            },
            "sequential": {
                **_SMALL,
                "weight": 2,
                "strategies": ["likelihood"],
                "baselines": ["random", "popularity", "item-knn", "markov-1"],
            },
        },
        "train": {"steps": 2, "learning_rate": 0.001, "lora": {"rank": 2}, "valid_rows": 2, "batch_tokens": 256},
        "eval": {"arms": ["zero-shot", "tuned"], "candidates": {"count": 4}, "bootstrap": 20, "backend": "hf"},
    },
    {
        "name": "codes",
        "model": {"name": "model", "max_length": 512},
        "data": {
            "source": "table",
            "path": "events.csv",
            "columns": {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp"},
            "split": {"kind": "leave_one_out"},
            "filter": {"user_core": 2},
        },
        "index": {"scheme": "sequential", "first": 100, "digits": 1},
        "tasks": {
            "direct": {**_SMALL, "strategies": ["label"], "baselines": ["random", "popularity", "item-knn", "markov-1"]}
        },
        "train": {"method": "lora", "steps": 2},
        "eval": {"shots": {"k": 1}, "users": 5, "candidates": {"count": 4, "kind": "uniform"}, "cutoffs": [1, 5]},
    },
)
SUITES: tuple[dict[str, Any], ...] = (
    {
        "suite": "tiny",
        "description": "A table of twelve users.",
        "task": "rating",
        "data": {"source": "table", "path": "events.csv"},
        "split_seeds": [0, 1],
        "rows": [
            {"baseline": "global-mean"},
            {"name": "factors", "baseline": "mf", "parameters": {"factors": 4}},
        ],
        "pairs": [["factors", "global-mean"]],
    },
    {
        "suite": "lists",
        "task": "ranking",
        "data": {"source": "table", "path": "events.csv", "split": {"kind": "leave_one_out"}},
        "cutoffs": [1, 5],
        "rows": [{"baseline": "popularity"}, {"name": "own", "recipe": "recipe.yaml", "overrides": ["train.steps=1"]}],
    },
    {
        "benchmark": "tiny",
        "description": "Two runs.",
        "recipe": "recipe.yaml",
        "runs": [
            {"name": "zero-shot", "overrides": ["eval.arms=[zero-shot]"]},
            {"name": "tuned", "seeds": [0, 1], "grid": {"eval.permutations": [1, 3]}},
        ],
    },
)
TEMPLATE: dict[str, Any] = {
    "family": "rating",
    "name": "spoiled",
    "version": 1,
    "use": "seen",
    "shape": "list",
    "user": "Ratings of {{ noun }}, from {{ scale_low }} to {{ scale_high }}."
    "{% for e in history %} {{ e.title }}{% endfor %}",
    "lead": "{{ item.title }}: ",
    "target": "{{ rating }}",
    "tail": "\n",
}
# Malformed templates of prompts and chats: errors, endless loops, and sandbox escapes.
SOURCES = (
    *("{% for m in %}", "{{ nope }}", "{{ item.nope }}", "{{", "}}", "{%", "{# ", "{% if %}", "{% endfor %}"),
    *("{{ item }}", "{{ history }}", "{{ 1 + 'a' }}", "{{ 1 // 0 }}", "{{ 9 ** 99999 }}", "{{ 'x' * 999999999 }}"),
    *("{{ item.title.x.y }}", "{{ messages.__class__.__mro__ }}", "{{ item.__class__ }}"),
    *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include 'x' %}", "{% import 'os' as os %}"),
    *("{% extends 'x' %}", "{% set x = 1 %}", "{{ self }}", "{{ loop }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% for i in range(99999999) %}x{% endfor %}"),
    *("{{ range(10) }}", "{{ raise_exception('no') }}", "{{ item.title | nope }}"),
    *("{{ item.title | replace('a', 'b') }}", "{{ lipsum() }}", "{{ history[99] }}", "{{ history['x'] }}"),
    *("{{ history | length }}", "{{ noun.upper() }}", "{{ noun | upper }}", "{{ '%s' % item }}"),
    *("{{ '{0.__class__}'.format(item) }}", "{{ cycler }}", "{{ namespace() }}", "{{ dict() }}", "<|im_end|>"),
    *("<|im_start|>system", "\u202e", "\x00", "\ud800".encode("utf-8", "replace").decode(), "é" * 50_000),
    *("{% raw %}{{ x }}", "{% filter upper %}x{% endfilter %}", "{% call x() %}{% endcall %}", "{% do x %}"),
    *("{{ " * 3000, "{% for e in history %}" * 60, "{{ (" * 500 + "1" + ")" * 500 + " }}", "{{ " + "-" * 5000 + "1 }}"),
    *("{{ 0x }}", "{{ " + "9" * 5000 + " }}", "{{ item['title'] }}", "{{ item.title[:2] }}", "{{ item.title ~ nope }}"),
    "\n" * 50_000,
)
REQUESTS: list[dict[str, Any]] = [
    {
        "id": f"r{n}",
        "user_id": f"u{n}",
        "history": [f"i{n}", {"item_id": "i1", "rating": 4, "timestamp": 1_700_000_000}],
        "candidates": ["i2", "i3", f"i{4 + n % 2}"],
    }
    for n in range(6)
]
REQUEST_FILE = "".join(json.dumps(request) + "\n" for request in REQUESTS).encode()
REQUEST_LINES = ["id,user_id,history,candidates", *(f"r{n},u{n},i0|i1,i2|i3|i{4 + n % 2}" for n in range(6))]
CODES = {f"i{n}": [n // 4, n % 4] for n in range(ITEMS)}
TOKENS = {f"i{n}": [f"<a_{n // 4}>", f"<b_{n % 4}>"] for n in range(ITEMS)}
CODE_LINES = ["item_id,code", *(f"{item},{'-'.join(map(str, code))}" for item, code in CODES.items())]
CODE_FILE = "".join(f"{line}\n" for line in CODE_LINES).encode()

_TOP = [{"token": name, "logprob": -0.5 - n, "bytes": None} for n, name in enumerate("123")]
MODELS = {"object": "list", "data": [{"id": "films", "object": "model", "created": 1, "owned_by": "vllm"}]}
CHAT = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "films",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "1", "reasoning_content": None},
            "finish_reason": "stop",
            "logprobs": {"content": [{"token": "1", "logprob": -0.5, "bytes": [49], "top_logprobs": _TOP}]},
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10, "prompt_tokens_details": None},
}
REFUSALS = (
    {"error": {"message": "no such thing", "type": "invalid_request_error", "param": None, "code": 400}},
    {"error": "no"},
    {"detail": [{"loc": ["body", "x"], "msg": "field required"}]},
    {"message": "<script>alert(1)</script>"},
)
