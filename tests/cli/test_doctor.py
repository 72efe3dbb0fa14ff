"""The doctor tells the truth about this machine, and about machines it is made to believe in."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import platform
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.cli import doctor
from megatron_vlm.cli.main import main

pytestmark = pytest.mark.unit

Version = namedtuple("Version", "major minor micro")


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, object]]]:
    """Exit code and the parts by name."""
    code = main(["doctor", "--json"])
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["can_train"] == (code == 0)
    return code, {part["name"]: part for part in parsed["parts"]}


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """A package `transformer_engine` with these modules, forgotten again after the test."""
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    (folder / "transformer_engine").mkdir()
    for name, text in {"__init__": "", **modules}.items():
        (folder / "transformer_engine" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    # Undone after the test, which leaves no entry behind.
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    del sys.modules["transformer_engine"]


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, parts = report(capsys)
    assert code == 0
    assert parts["Python"]["found"] == platform.python_version()
    assert str(parts["torch"]["found"]).startswith(torch.__version__)
    for name, distribution in (
        ("megatron-core", "megatron-core"),
        ("psutil", "psutil"),
        ("einops", "einops"),
    ):
        assert parts[name]["found"] == importlib.metadata.version(distribution)
    assert parts["NCCL"]["required"] == torch.cuda.is_available()
    assert all(len(str(part["without"])) > 10 for part in parts.values())


def test_table_says_the_same_and_gives_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "megatron-core *" in out and "0.16.1" in out
    assert out.rstrip().splitlines()[-1].startswith("Training can run on this machine")


@pytest.mark.parametrize("module", ["psutil", "einops"])
def test_missing_required_part(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, parts = report(capsys)
    assert code == 1
    assert parts[module]["status"] == "missing"
    assert main(["doctor"]) == 1
    assert f"Mend first: {module}." in capsys.readouterr().out


def test_unsupported_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "0.17.0" if name == "megatron-core" else real(name),
    )
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.setattr(sys, "version_info", Version(3, 13, 0))
    code, parts = report(capsys)
    assert code == 1
    assert parts["megatron-core"]["found"] == "0.17.0; supported: 0.16.1 alone"
    for name in ("megatron-core", "torch", "Python"):
        assert parts[name]["status"] == "unsupported"


def test_no_part_can_crash_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    package(tmp_path, monkeypatch, pytorch="raise ImportError('libcudart.so.13:\\n cannot open')")
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text("raise OSError('undefined symbol')")
    (tmp_path / "mpi4py.py").write_text("raise SystemExit(3)")
    program(tmp_path, "srun", "exit 1")
    program(tmp_path, "sbatch", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, parts = report(capsys)
    assert code == 0, "none of these is required"
    assert parts["Transformer Engine"]["found"] == "ImportError: libcudart.so.13: cannot open"
    assert parts["Apex"]["found"] == "OSError: undefined symbol"
    assert [parts[name]["status"] for name in ("Transformer Engine", "Apex", "MPI (mpi4py)")] == [
        "broken"
    ] * 3
    assert parts["Slurm"]["status"] == "ok"


def test_half_installed_transformer_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package(tmp_path, monkeypatch)
    parts = report(capsys)[1]
    assert parts["Transformer Engine"]["found"] == "no module transformer_engine.pytorch"


def test_slurm_and_mpi_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path, "srun", "echo slurm-wlm 22.05.8")
    program(tmp_path, "sbatch", "exit 0")
    program(tmp_path, "mpirun", "echo 'mpirun (Open MPI) 4.1.4'; echo more")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    parts = report(capsys)[1]
    assert parts["Slurm"]["found"] == "slurm-wlm 22.05.8; inside job 4711"
    assert str(parts["MPI launcher"]["found"]).endswith("mpirun: mpirun (Open MPI) 4.1.4")


def test_gpus_are_counted_by_kind_and_then_need_nccl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path, "nvidia-smi", "echo 580.65.06; echo 580.65.06; echo 580.65.06")
    monkeypatch.setenv("PATH", str(tmp_path))
    devices = [SimpleNamespace(name="H200", total_memory=150 << 30)] * 2
    devices.append(SimpleNamespace(name="L4", total_memory=24 << 30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    code, parts = report(capsys)
    assert parts["GPUs"]["found"] == "2 x H200, 150 GiB; 1 x L4, 24 GiB; driver 580.65.06"
    assert parts["NCCL"]["required"] and code == 1


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a GPU-less torch build")
def test_gpus_hidden_by_a_cpu_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path, "nvidia-smi", "echo 580.65.06")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, parts = report(capsys)
    assert code == 0
    assert parts["GPUs"]["found"] == "1 present, but torch is a CPU build: install a CUDA build"


def test_table_without_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert doctor.run(argparse.Namespace(json=False)) == 0
    assert "megatron-core *: ok, 0.16.1; without it:" in capsys.readouterr().out


def test_what_it_checks_is_what_setup_declares() -> None:
    setup = Path(__file__).parents[2] / "setup.py"
    assigned = {
        ast.unparse(node.targets[0]): node.value
        for node in ast.parse(setup.read_text()).body
        if isinstance(node, ast.Assign)
    }
    declared = set(ast.literal_eval(assigned["REQUIRES"]))
    assert f"torch>={doctor.OLDEST_TORCH[0]}.{doctor.OLDEST_TORCH[1]}" in declared
    assert f"megatron-core=={doctor.MEGATRON_CORE}" in declared
    bare = {name.split(">")[0].split("=")[0].lower() for name in declared}
    checked = {"torch", "megatron-core", "psutil", "einops", *map(str.lower, doctor.PACKAGES)}
    assert bare == checked
    assert 'python_requires=">=3.11,<3.13"' in setup.read_text()
    assert doctor.SUPPORTED_PYTHON == ((3, 11), (3, 12))
