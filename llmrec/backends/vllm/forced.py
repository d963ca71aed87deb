"""The logits processor behind forced scoring; vLLM's engine process imports it by path (V1 runner)."""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class _Force:
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, output_ids: list[int], logits: Any) -> Any:
        if len(output_ids) < len(self.ids):
            logits[self.ids[len(output_ids)]] = 1e4
        return logits


class ForcedTokens(AdapterLogitsProcessor):  # type: ignore[misc]
    """Allows only the next token of ``extra_args['llmrec_forced']``; raw log-probabilities are unchanged."""

    def is_argmax_invariant(self) -> bool:
        """Return that this processor changes the most likely token."""
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """Return the processor of one request, or None for requests that force nothing."""
        ids = (params.extra_args or {}).get("llmrec_forced")
        return _Force(ids) if ids else None
