"""The API of vLLM that llmrec uses exists, and missing parts are reported. Wheels: tests/test_resolution.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import vllm_api


@pytest.fixture
def vllm_folder() -> Path:
    folder = vllm_api.installed()
    if folder is None:
        pytest.skip("vLLM is not installed")
    return folder


def test_installed_vllm_has_the_used_api(vllm_folder: Path) -> None:
    assert vllm_api.missing(vllm_api.source_of(vllm_folder)) == []
    keywords, imports, variables = vllm_api.used()
    assert {"enable_lora", "max_lora_rank", "logits_processors", "hf_overrides"} <= keywords["LLM"]
    assert {"prompt_logprob_token_ids", "skip_reading_prefix_cache", "max_tokens"} <= keywords["SamplingParams"]
    assert keywords["LoRARequest"] == {"lora_name", "lora_int_id", "lora_path"}
    assert ("vllm.v1.sample.logits_processor", "AdapterLogitsProcessor") in imports
    assert ("vllm.platforms", "current_platform") in imports and ("vllm.lora.request", "") in imports
    assert "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS" in variables


@pytest.mark.parametrize(
    ("file", "before", "after", "fault"),
    [
        ("vllm/outputs.py", "num_cached_tokens", "num_known_tokens", "RequestOutput.num_cached_tokens"),
        ("vllm/sampling_params.py", "prompt_logprob_start", "gone", "SamplingParams(prompt_logprob_start=...)"),
        ("vllm/entrypoints/llm.py", "lora_request", "gone", "LLM.enqueue"),
        ("vllm/lora/request.py", "LoRARequest", "Gone", "LoRARequest(lora_name=...)"),
        ("vllm/envs.py", "VLLM_NO_USAGE_STATS", "GONE", "VLLM_NO_USAGE_STATS"),
    ],
)
def test_missing_parts_are_named(vllm_folder: Path, file: str, before: str, after: str, fault: str) -> None:
    plain = vllm_api.source_of(vllm_folder)

    def changed(name: str) -> str | None:
        text = plain(name)
        return text.replace(before, after) if name == file and text is not None else text

    assert [line for line in vllm_api.missing(changed) if line.startswith(fault)]


def test_check_of_an_installed_folder(vllm_folder: Path, tmp_path: Path) -> None:
    assert vllm_api.main([str(vllm_folder)]) == 0
    (tmp_path / "vllm").mkdir()
    assert vllm_api.main([str(tmp_path)]) == 1
