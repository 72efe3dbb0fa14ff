"""The examples of every `--help` run as they are typed: each parses, loads and has a layout."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_vlm.cli.main import COMMANDS, _parse, _subcommand_parser, subcommand_module
from megatron_vlm.config import load_recipe
from megatron_vlm.demo.settings import demo_config
from megatron_vlm.topology.layout import resolve_layout

pytestmark = pytest.mark.unit


def examples(name: str) -> list[list[str]]:
    """The words of each example, redirections left out."""
    text = subcommand_module(name).HELP.partition("example:\n")[2]
    lines = text.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line.partition(" > ")[0]) for line in lines]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_run_as_typed(name: str) -> None:
    module = subcommand_module(name)
    found = examples(name)
    assert found
    for words in found:
        processes = 1
        if words[0] == "torchrun":
            assert words[1] == "--nproc-per-node" and words[3:5] == ["-m", "megatron_vlm"]
            processes, words = int(words[2]), ["mvlm", *words[5:]]
        while "=" in words[0]:  # variables of the environment
            words = words[1:]
        assert words[:2] == ["mvlm", name]
        args = _parse(_subcommand_parser(name, module), words[2:])
        if name == "demo":
            for count in (1, 2, 4, 8):
                demo_config(args.run_dir, args.nproc or count, args.overrides)
        elif hasattr(args, "recipe"):
            config = load_recipe(args.recipe, args.overrides)
            each = getattr(args, "gpus_per_node", None) or getattr(args, "ranks_per_node", None)
            if each:
                processes = (args.nodes or 1) * each
            if name != "config":
                resolve_layout(config, getattr(args, "nproc", None) or processes)
            paths = [source.path for source in config.data.train.values()]
            assert name not in ("train", "launch") or paths == ["datasets/train"]


def test_the_documented_processes_are_those_of_the_recipe() -> None:
    config = load_recipe("demo")
    assert resolve_layout(config, 2).ep == 2
    assert demo_config(Path("runs/demo"), 2, []).parallel == config.parallel
