"""Clients for `eval.benchmarks.serving`, played by locust: each asks its next question when the last is answered.

``locust -f eval/benchmarks/serving_load.py`` with ``LLMREC_LOAD`` set to a JSON object: ``path``, ``bodies`` (asked in
turn) and ``log``, a file that gets one line an answer: status, milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import time

from locust import FastHttpUser, constant, events, task

SETTINGS = json.loads(os.environ["LLMREC_LOAD"])


class Client(FastHttpUser):
    """Asks one question after another."""

    wait_time = constant(float(SETTINGS.get("wait", 0)))

    @task
    def ask(self) -> None:
        body = random.choice(SETTINGS["bodies"])
        with self.client.post(SETTINGS["path"], json=body, catch_response=True) as answer:
            # A refusal is an answer here; whoever reads the log counts it.
            answer.success()


_LOG = open(SETTINGS["log"], "a", buffering=1)  # noqa: SIM115, PTH123


@events.request.add_listener
def noted(response_time: float, response: object, exception: object, **_: object) -> None:
    status = getattr(response, "status_code", 0) or 0
    _LOG.write(f"{time.time():.3f} {status} {response_time:.2f}\n")
