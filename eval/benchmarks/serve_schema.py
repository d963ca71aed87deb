"""Tests a service with valid and invalid requests from its OpenAPI document: ``make bench NAME=schema``.

schemathesis (in a separate environment, ``SCHEMATHESIS=/path/to/schemathesis``) generates cases for every endpoint:
examples, bounds, valid and invalid fuzzed bodies, methods, missing keys, call sequences. Its checks find server errors,
undocumented statuses, types and bodies, accepted invalid bodies, and missing authentication.

The service is that of ``RUN=FOLDER``, or a toy model of two layers over a shop of forty synthetic products, in float32
with transformers, with API keys. Changes go to a store in a temporary folder.

422 is accepted for a valid body, since a well-formed request may have no answer; `serve_schema_hooks` checks that the
body itself is not rejected. A body above the limit gets 413, valid or not. Statuses are counted by the service.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json
from llmrec.serve.app import make_app
from llmrec.serve.gates import Auth
from llmrec.serve.keys import Keys, create_key
from llmrec.serve.options import ServeOptions
from llmrec.serve.run import make_service
from tests.answer.rank_cases import toy_run
from tests.conftest import make_model
from tests.serve.served import listening, wait_ready

HOOKS = Path(__file__).with_name("serve_schema_hooks.py")
SEED = 20261
# Item ids in the examples of the OpenAPI document, so that these items exist.
_NAMED = ("1", "2", "7", "9")
_CONFIG = """
hooks = {hooks}
continue-on-failure = true
request-timeout = 120
max-time = {seconds}

[generation]
max-examples = {examples}
no-shrink = true
database = "none"

[checks]
enabled = true
positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "413", "422", "429", "5xx"]
negative_data_rejection.expected-statuses = ["400", "401", "403", "404", "405", "413", "415", "422", "429", "5xx"]

# Each of its calls starts an engine.
[[operations]]
include-path = "/v1/reload"
generation.max-examples = 1
phases.fuzzing.enabled = false
phases.stateful.enabled = false
"""


@dataclass(frozen=True)
class Running:
    """A service, and a key with all permissions."""

    url: str
    key: str

    def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Send a request that must succeed."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.request(method, f"{self.url}{path}", headers=headers, timeout=120, **arguments).raise_for_status()


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--run", default="")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--seed", type=int, default=SEED)
    chosen = parser.parse_args()
    tool = os.environ.get("SCHEMATHESIS", "schemathesis")
    with tempfile.TemporaryDirectory() as name, serving(chosen.run, Path(name)) as service:
        before = counted(service)
        report = run_schemathesis(tool, service, Path(name), chosen)
        answers = counted(service) - before
    statuses: Counter[str] = Counter()
    for (_, status), count in answers.items():
        statuses[status] += count
    result = {
        "command": f"make bench NAME=schema{' RUN=...' if chosen.run else ''}",
        "what": "valid and invalid requests by schemathesis from the OpenAPI document of a service",
        "model": Path(chosen.run).name if chosen.run else "toy, two layers",
        **report,
        "statuses": dict(sorted(statuses.items())),
        "faults": {f"{status} {endpoint}": count for (endpoint, status), count in answers.items() if status >= "500"},
        **provenance(),
    }
    write_json(chosen.target, result)
    print(json.dumps({key: result[key] for key in ("cases", "failures", "statuses", "faults", "seconds")}, indent=1))  # noqa: T201


@contextmanager
def serving(run: str, folder: Path) -> Iterator[Running]:
    """Serve a run, or a toy model, with API keys."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run = run or str(toy_run(make_model(folder / "model"), folder / "run"))
    options = ServeOptions(model=run, backend="hf", dtype="float32", store=str(folder / "store.sqlite"))
    keys = folder / "keys.json"
    key = create_key(keys, "schemathesis", admin=True)
    with listening(make_app(make_service(options), Auth(Keys.read(keys)))) as (url,):
        wait_ready(url)
        service = Running(url, key)
        items = [{"item_id": name, "title": f"Example {name}"} for name in _NAMED]
        service.ask("PUT", "/v1/items", json={"items": items})
        service.ask("POST", "/v1/events", json={"events": [{"user_id": "42", "item_id": name} for name in _NAMED]})
        yield service


def run_schemathesis(tool: str, service: Running, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run schemathesis, and return its report."""
    config, report = folder / "schemathesis.toml", folder / "report.json"
    settings = {"hooks": json.dumps(str(HOOKS)), "seconds": chosen.seconds, "examples": chosen.examples}
    config.write_text(_CONFIG.format(**settings), encoding="utf-8")
    command = [tool, "--config-file", str(config), "run", f"{service.url}/openapi.json", "--seed", str(chosen.seed)]
    command += ["-H", f"Authorization: Bearer {service.key}"]
    command += ["--report", "json", "--report-json-path", str(report), "--no-color"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    # A case may be as long as the longest body.
    print("\n".join(line[:400] for line in f"{done.stdout}\n{done.stderr}".splitlines() if line))  # noqa: T201
    summary = json.loads(report.read_text(encoding="utf-8"))
    return {
        "schemathesis": summary["schemathesis_version"],
        "seed": summary["seed"],
        "seconds": round(summary["running_time"], 1),
        "complete": summary["complete"],
        "operations": {key: summary["operations"][key] for key in ("total", "tested", "errored", "skipped")},
        "phases": {name: phase["status"] for name, phase in summary["phases"].items()},
        "cases": summary["test_cases"],
        "failures": {failure["title"]: failure["count"] for failure in summary["failures"]},
        "errors": summary["errors"],
        "warnings": {name: count for name, count in summary["warnings"].items() if count},
        "good_bodies": good_bodies(summary["valid_rates"]),
    }


def good_bodies(rates: dict[str, Any]) -> dict[str, int]:
    """Return the outcomes of cases that match the schema, over all endpoints and phases."""
    outcomes: Counter[str] = Counter()
    for phases in rates.values():
        for counts in phases.values():
            outcomes.update(counts)
    return dict(outcomes)


def counted(service: Running) -> Counter[tuple[str, str]]:
    """Return the number of responses by endpoint and status."""
    row = r'^llmrec_requests_total\{endpoint="(.*)",status="(\d+)"\} (\S+)$'
    matches = re.findall(row, service.ask("GET", "/metrics").text, re.MULTILINE)
    return Counter({(endpoint, status): int(float(count)) for endpoint, status, count in matches})


if __name__ == "__main__":
    main()
