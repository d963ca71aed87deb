"""Locust clients for `eval.benchmarks.serving`: each sends its next request after the last response.

``locust -f eval/benchmarks/serving_load.py`` with ``LLMREC_LOAD`` set to a JSON object: ``path``, ``bodies`` (sent in
turn) and ``log``, a file with one line per response: status, milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import time

from locust import FastHttpUser, constant, events, task

SETTINGS = json.loads(os.environ["LLMREC_LOAD"])


class Client(FastHttpUser):
    """Sends one request after another."""

    wait_time = constant(float(SETTINGS.get("wait", 0)))

    @task
    def ask(self) -> None:
        body = random.choice(SETTINGS["bodies"])
        with self.client.post(SETTINGS["path"], json=body, catch_response=True) as answer:
            # A rejection is a response here; it is counted from the log.
            answer.success()


_LOG = open(SETTINGS["log"], "a", buffering=1)  # noqa: SIM115, PTH123


@events.request.add_listener
def record_response(response_time: float, response: object, exception: object, **_: object) -> None:
    status = getattr(response, "status_code", 0) or 0
    _LOG.write(f"{time.time():.3f} {status} {response_time:.2f}\n")
