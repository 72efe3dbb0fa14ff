"""One real Slurm cluster of four nodes for the tests of this folder, and a run to compare with."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.cluster.job import REPOSITORY, Job, Result, launched
from tests.nano_data import build_nano_data


def _simulator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "slurm_sim", REPOSITORY / "slurm" / "sim" / "cluster.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared() -> Iterator[Path]:
    """A folder that every node sees, short enough for Unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="mvlm-cluster-", dir="/var/tmp"))
    yield folder
    if "MVLM_KEEP" not in os.environ:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(shared: Path) -> Iterator[Any]:
    """Four nodes, started once; a test leaves them as it found them."""
    simulator = _simulator()
    try:
        simulator._check_machine()
    except simulator.ClusterError as error:
        pytest.skip(f"needs Slurm and root: {error}")
    # Before the nodes: mounts made later do not reach them.
    small = shared / "small_disk"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", small], check=True)
    found = simulator.Cluster(shared / "slurm")
    try:
        found.start(4, keep=[REPOSITORY, Path(sys.prefix)])
        yield found
        found.stop()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.fixture(scope="session")
def cluster_data(shared: Path) -> Path:
    return build_nano_data(shared / "data")


@pytest.fixture(scope="session")
def undisturbed(shared: Path, cluster_data: Path) -> Result:
    return launched(cluster_data, shared / "undisturbed")


@pytest.fixture
def job(cluster: Any, cluster_data: Path, shared: Path, request: pytest.FixtureRequest) -> Any:
    """A run that is not sent yet; afterwards the cluster is whole and empty again."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    made = Job(cluster, cluster_data, shared / "runs" / name)
    yield made
    cluster.mend_all()
    if "MVLM_KEEP" not in os.environ:
        shutil.rmtree(made.run_dir, ignore_errors=True)
