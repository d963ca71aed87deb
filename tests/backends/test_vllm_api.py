"""What llmrec uses of vLLM is there, and its absence is noticed. Wheels of the index: tests/test_resolution.py."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from tests import vllm_api


@pytest.fixture
def own() -> Path:
    place = vllm_api.installed()
    if place is None:
        pytest.skip("vLLM is not installed")
    return place


def test_the_installed_vllm_has_all_that_is_used(own: Path) -> None:
    assert vllm_api.missing(vllm_api.source_of(own)) == []
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
        ("vllm/outputs.py", "prompt_token_id_logprobs", "gone", "RequestOutput.prompt_token_id_logprobs"),
        ("vllm/sampling_params.py", "prompt_logprob_start", "gone", "SamplingParams(prompt_logprob_start=...)"),
        ("vllm/engine/arg_utils.py", "max_lora_rank", "gone", "LLM(max_lora_rank=...)"),
        ("vllm/entrypoints/llm.py", "lora_request", "gone", "LLM.enqueue"),
        ("vllm/lora/request.py", "LoRARequest", "Gone", "LoRARequest(lora_name=...)"),
        ("vllm/envs.py", "VLLM_NO_USAGE_STATS", "GONE", "VLLM_NO_USAGE_STATS"),
        ("vllm/config/vllm.py", "use_v2_model_runner", "gone", "VllmConfig.use_v2_model_runner"),
    ],
)
def test_what_another_vllm_lacks_is_named(own: Path, file: str, before: str, after: str, fault: str) -> None:
    plain = vllm_api.source_of(own)

    def changed(name: str) -> str | None:
        text = plain(name)
        return text.replace(before, after) if name == file and text is not None else text

    assert [line for line in vllm_api.missing(changed) if line.startswith(fault)]


def test_a_new_use_is_seen_and_a_wheel_is_read(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llmrec" / "backends"
    folder.mkdir(parents=True)
    (folder / "new.py").write_text(
        "from vllm.nowhere import Thing\n"
        "def ask(vllm, environment):\n"
        "    vllm.SamplingParams(temperature=0, unknown=1)\n"
        "    environment['VLLM_UNKNOWN_THING'] = '1'\n"
    )
    needed = {use.file for use in vllm_api.ATTRIBUTES} | {file for each in vllm_api.CALLS.values() for file, _ in each}
    wheel = tmp_path / "vllm-0.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in needed | {"vllm/envs.py"}:
            archive.write(own / file, file)
    assert vllm_api.missing(vllm_api.source_of(wheel), tmp_path) == [
        "SamplingParams(unknown=...): no such parameter",
        "vllm.nowhere: no such module",
        "VLLM_UNKNOWN_THING: no such environment variable",
    ]
    assert vllm_api.main([str(own)]) == 0
    shutil.copytree(tmp_path, tmp_path.with_name("empty") / "vllm", dirs_exist_ok=True)
    assert vllm_api.main([str(tmp_path.with_name("empty"))]) == 1
