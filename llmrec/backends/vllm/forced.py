"""The logits processor for scoring of given tokens; the vLLM engine process imports it by path (V1 runner)."""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class _ForcedPath:
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, output_ids: list[int], logits: Any) -> Any:
        if len(output_ids) < len(self.ids):
            logits[self.ids[len(output_ids)]] = 1e4
        return logits


class ForcedTokens(AdapterLogitsProcessor):  # type: ignore[misc]
    """Allows only the next token in ``extra_args['llmrec_forced']``; raw log-probabilities are unchanged."""

    def is_argmax_invariant(self) -> bool:
        """Return False, because this processor changes the most likely token."""
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """Return the processor for a request, or None if the request forces no tokens."""
        ids = (params.extra_args or {}).get("llmrec_forced")
        return _ForcedPath(ids) if ids else None
