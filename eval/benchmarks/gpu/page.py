"""The page of `make gpu-check`, written from its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eval.benchmarks.gpu.checks import CHECKS

_HEAD = """# On a GPU

What has been seen of llmrec on a GPU, check by check. `make gpu-check` runs the checks on a machine with an NVIDIA \
GPU and writes this page from `eval/results/gpu.json`; what passed is not run again for the same card and commit:

```sh
make gpu-check                     # hours, and 60 GB of disk: models of 8B weights are made and tuned
make gpu-check ARGS="--only 1 3 9"    # some of them
```

"""


def page(found: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        found: What `eval.benchmarks.gpu.__main__.run` returned; with no checks, it says that none was run.
    """
    checks = found["checks"]
    lines = [
        _HEAD + _told(checks),
        "",
        "| | Check | It passes where | Verdict | Seconds | Found |",
        "|---|---|---|---|---|---|",
    ]
    for check in CHECKS:
        entry = checks.get(str(check.number), {"verdict": "not run", "seconds": None, "found": {}, "said": ""})
        seconds = "" if entry["seconds"] is None else f"`{entry['seconds']:.0f}`"
        what = json.dumps(entry["found"], ensure_ascii=False) if entry["found"] else ""
        shown = "; ".join(filter(None, (_code(what), entry["said"].replace("|", "\\|"))))
        lines.append(f"| {check.number} | {check.name} | {check.passes} | {entry['verdict']} | {seconds} | {shown} |")
    return "\n".join(lines) + "\n"


def _told(checks: Mapping[str, Any]) -> str:
    if not checks:
        return "**No machine with a GPU has run any of them yet.** Nothing in this project's figures comes from a GPU."
    passed = sum(entry["verdict"] == "passed" for entry in checks.values())
    stamps = " and ".join(sorted({f"`{entry['stamp']}`" for entry in checks.values()}))
    return f"{passed} of {len(CHECKS)} passed, on {stamps}."


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""
