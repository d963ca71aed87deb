"""Load-tests a service with locust: throughput, overload, an engine crash and a model reload.

``LOCUST=/path/to/locust python -m eval.benchmarks.serving TARGET.json [--demo RUN] [--titles RUN] [--decoder RUN]``.
``--demo`` names a run of ``recipes/demo.yaml``; ``--titles`` a run whose model ranks titles and explains, such as the
quickstart's; ``--decoder`` one that was fine-tuned on semantic IDs. The parts of each run are measured and
replaced in the target, which is written after every part. locust needs a separate environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json

CLIENTS = (1, 8, 32, 128)
LOCUST = os.environ.get("LOCUST", "locust")
LOAD = Path(__file__).with_name("serving_load.py")


@dataclass(frozen=True)
class Service:
    """A service under test."""

    url: str
    process: subprocess.Popen[str]

    def engine(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return max(children, key=lambda child: child.memory_info().rss)

    def megabytes(self) -> float:
        parent = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [parent, *parent.children(recursive=True)]) / 1e6

    def ready(self, patience: float = 600.0) -> float:
        """Wait until the service answers, and return the seconds."""
        begun = time.monotonic()
        while time.monotonic() - begun < patience:
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return time.monotonic() - begun
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise SystemExit("the service was not ready in time")


@contextmanager
def serving(run: str, store: Path, *options: str) -> Iterator[Service]:
    command = [sys.executable, "-m", "llmrec.cli.main", "serve", run, "--port", "0", "--store", str(store), "--quiet"]
    process = subprocess.Popen(
        [*command, "--dtype", "float32", "--backend", "hf", *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"http://\S+", line)
    assert match, line
    threading.Thread(target=process.stdout.read, daemon=True).start()
    service = Service(match[0], process)
    try:
        service.ready()
        yield service
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def load(
    service: Service,
    path: str,
    bodies: Sequence[Any],
    clients: int,
    seconds: float,
    folder: Path,
    *,
    pause: float = 0.0,
) -> np.ndarray:
    """Run clients for some seconds, with a pause after each response.

    Returns:
        Time, status and milliseconds of every answer, shape (n, 3).
    """
    log = folder / "answers.log"
    log.unlink(missing_ok=True)
    settings = {"path": path, "bodies": list(bodies), "log": str(log), "wait": pause}
    command = [LOCUST, "-f", str(LOAD), "--headless", "-u", str(clients), "-r", str(clients)]
    command += ["-t", f"{seconds:.0f}s", "--host", service.url, "--only-summary", "--stop-timeout", "70"]
    subprocess.run(
        command,
        env={**os.environ, "LLMREC_LOAD": json.dumps(settings)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    rows = [list(map(float, line.split())) for line in log.read_text().splitlines()] if log.exists() else []
    return np.array(rows).reshape(-1, 3)


def load_summary(answers: np.ndarray) -> dict[str, Any]:
    """Return the throughput and latency of answered requests, and the number and latency of rejected ones."""
    ok, refused = answers[answers[:, 1] == 200], answers[answers[:, 1] == 429]
    span = float(np.ptp(ok[:, 0] - ok[:, 2] / 1000)) if len(ok) > 1 else 0.0
    last = float(ok[:, 0].max() - (ok[:, 0] - ok[:, 2] / 1000).min()) if len(ok) else 0.0
    return {
        "answered": len(ok),
        "per_second": len(ok) / last if last else 0.0,
        "p50_ms": _share(ok, 50),
        "p99_ms": _share(ok, 99),
        "refused": len(refused),
        "refused_p99_ms": _share(refused, 99),
        "others": int(len(answers) - len(ok) - len(refused)),
        "span_s": span,
    }


def _share(rows: np.ndarray, percent: float) -> float | None:
    return float(np.percentile(rows[:, 2], percent)) if len(rows) else None


# --------------------------------------------------------------------------- workloads


def questions(service: Service, kind: str) -> tuple[str, list[Any]]:
    """Return an endpoint and distinct bodies over the service's items."""
    items = [item["item_id"] for item in httpx.get(f"{service.url}/v1/items?limit=600").json()["items"]]
    histories = [[items[(7 * n + 3 * k) % len(items)] for k in range(8)] for n in range(200)]
    if kind in ("classic", "ensemble", "decoder"):
        return "/v1/rank", [{"history": history, "k": 10} for history in histories]
    if kind == "titles":
        return "/v1/rank", [
            {"history": history, "candidates": [items[(11 * n + 5 * k + 1) % len(items)] for k in range(20)]}
            for n, history in enumerate(histories)
        ]
    return "/v1/explain", [{"history": history, "item_id": items[n]} for n, history in enumerate(histories)]


def workload(kind: str, run: str, folder: Path, seconds: float, batch: int) -> dict[str, Any]:
    model = {"classic": "transitions", "ensemble": "fusion"}.get(kind, "tuned")
    with serving(run, folder / f"{kind}.sqlite", "--batch", str(batch), "--models", model) as service:
        path, bodies = questions(service, kind)
        load(service, path, bodies, 4, 5, folder)
        levels = CLIENTS if batch > 1 else (32,)
        results = {str(n): load_summary(load(service, path, bodies, n, seconds, folder)) for n in levels}
        return {"levels": results, "megabytes": service.megabytes()}


def overload(run: str, folder: Path, minutes: float) -> dict[str, Any]:
    """Send five times the load of the queue; return rejections, and memory every 15 seconds.

    Clients that retry at once are the worst case, since rejections use the processor; clients that wait for a second
    respect Retry-After.
    """
    options = ("--models", "fusion", "--room", "32", "--timeout", "30")
    with serving(run, folder / "overload.sqlite", *options) as service:
        path, bodies = questions(service, "ensemble")
        alone = load_summary(load(service, path, bodies, 16, 10, folder))
        memory: list[float] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(15):
                memory.append(service.megabytes())

        watching = threading.Thread(target=watch)
        watching.start()
        crowd = load(service, path, bodies, 5 * 32, 60 * minutes, folder)
        patient = load(service, path, bodies, 5 * 32, 30, folder, pause=1.0)
        ended.set()
        watching.join()
        return {
            "minutes": minutes,
            "without": alone,
            "crowd": load_summary(crowd),
            "patient_crowd": load_summary(patient),
            "megabytes": memory,
            "growth": (float(np.mean(memory[-4:]) / np.mean(memory[3:7]) - 1) if len(memory) > 8 else None),
        }


def broken(run: str, folder: Path) -> dict[str, Any]:
    """Kill the engine under load while events are sent; return the recovery time, and how many events were kept."""
    with serving(run, folder / "broken.sqlite", "--models", "tuned") as service:
        begun = time.monotonic()
        items = httpx.get(f"{service.url}/v1/items?limit=10").json()["items"]
        sent, ended = [0], threading.Event()

        def send() -> None:
            while not ended.is_set():
                # The service returns at most a thousand events of a user's history.
                event = {"user_id": f"load-{sent[0] % 20}", "item_id": items[0]["item_id"]}
                answer = httpx.post(f"{service.url}/v1/events", json={"events": [event]}, timeout=30)
                sent[0] += answer.status_code == 200

        sending = threading.Thread(target=send)
        sending.start()
        time.sleep(2)
        service.engine().kill()
        killed = time.monotonic()
        body = {"history": [items[0]["item_id"]], "k": 3}
        status = httpx.post(f"{service.url}/v1/rank", json=body, timeout=60).status_code
        refused = time.monotonic() - killed
        back = service.ready()
        after = httpx.post(f"{service.url}/v1/rank", json=body, timeout=60).status_code
        ended.set()
        sending.join()
        users = [httpx.get(f"{service.url}/v1/users/load-{n}").json() for n in range(20)]
        kept = sum(len(user["history"]) for user in users)
        return {
            "start_seconds": killed - begun,
            "status_after_kill": status,
            "seconds_to_it": refused,
            "back_seconds": refused + back,
            "status_then": after,
            "events_accepted": sent[0],
            "events_kept": kept,
        }


def swapped(run: str, folder: Path) -> dict[str, Any]:
    """Reload the models under load; return the number of failed requests."""
    with serving(run, folder / "swapped.sqlite", "--models", "tuned") as service:
        path, bodies = questions(service, "decoder")
        seconds: list[float] = []

        def swap() -> None:
            time.sleep(3)
            begun = time.monotonic()
            httpx.post(f"{service.url}/v1/reload", timeout=300).raise_for_status()
            seconds.append(time.monotonic() - begun)

        swapping = threading.Thread(target=swap)
        swapping.start()
        answers = load(service, path, bodies, 8, 60, folder)
        swapping.join()
        return {"seconds": seconds[0] if seconds else None, **load_summary(answers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", type=Path)
    parser.add_argument("--demo", help="a run of recipes/demo.yaml")
    parser.add_argument("--titles", help="a run that ranks titles and explains")
    parser.add_argument("--decoder", help="a run that was fine-tuned on semantic IDs")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    folder = Path("runs") / "benchmarks" / "serving"
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(options.target.read_text()) if options.target.is_file() else {}
    kinds = {"demo": ("classic", "ensemble"), "decoder": ("decoder",), "titles": ("titles", "generation")}
    parts: dict[str, Any] = {}
    for name in kinds:
        if (run := getattr(options, name)) is not None:
            for kind, (way, batch) in product(kinds[name], (("batched", 32), ("alone", 1))):
                parts[f"{kind}_{way}"] = partial(workload, kind, run, folder, options.seconds, batch)
    if options.demo is not None:
        parts["overload"] = partial(overload, options.demo, folder, options.minutes)
    if options.titles is not None:
        parts["broken"] = partial(broken, options.titles, folder)
    if options.decoder is not None:
        parts["swapped"] = partial(swapped, options.decoder, folder)
    for name, measure in parts.items():
        begun = time.monotonic()
        results[name] = {**measure(), "seconds_taken": time.monotonic() - begun, "load_before": os.getloadavg()[0]}
        results |= {
            **provenance(),
            "command": "make bench NAME=serving",
            "seconds": options.seconds,
            "locust": subprocess.run([LOCUST, "--version"], capture_output=True, text=True).stdout.split()[1],
        }
        write_json(options.target, results)
        print(name, json.dumps(results[name])[:300], flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
