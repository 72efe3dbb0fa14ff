"""Hooks and fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# Ranks are forked: asking for GPUs must not start CUDA in the parent. Read when torch is imported.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from tests.nano_data import build_nano_data, build_text_data
from tests.skips import (  # noqa: F401 - pytest finds hooks by their names in this file
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_runtest_setup,
)


@pytest.fixture(scope="session")
def nano_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the `train` and `held_out` sets of pictures and text."""
    return build_nano_data(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the `train` and `held_out` sets of text alone."""
    return build_text_data(tmp_path_factory.mktemp("text"))
