"""The command line: exit codes, one-line errors, --debug anywhere, and an instant --help."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron_vlm import __version__
from megatron_vlm.cli.main import COMMANDS, main, subcommand_module
from megatron_vlm.config import load_recipe
from megatron_vlm.errors import ConfigError

pytestmark = pytest.mark.unit

RECIPE = """
model:
  language: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 128,
             vocab_size: 384}
training: {train_iters: 3, seq_length: 128, global_batch_size: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def seen() -> list[argparse.Namespace]:
    """The arguments each call of `record` got."""
    return []


@pytest.fixture
def record(seen: list[argparse.Namespace]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 0

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Stand in for the subcommand `train` with one that does what the test wants."""

    def install(
        run: Callable[[argparse.Namespace], int],
        add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    ) -> ModuleType:
        module = ModuleType("megatron_vlm.cli.train")
        vars(module).update(HELP="Stand-in.", add_arguments=add_arguments, run=run)
        monkeypatch.setitem(sys.modules, "megatron_vlm.cli.train", module)
        return module

    return install


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def exit_of(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_exit_code_is_the_subcommands(command: Callable[..., ModuleType]) -> None:
    command(lambda args: 7)
    assert main(["train"]) == 7


def test_user_error_is_a_line_for_each_mistake(
    command: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(ConfigError("first thing\nsecond thing")))
    assert main(["train"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "mvlm: error: first thing\nmvlm: error: second thing\n")


def test_interrupt(command: Callable[..., ModuleType]) -> None:
    command(raising(KeyboardInterrupt()))
    assert main(["train"]) == 130


def test_any_other_exception_is_one_line_that_offers_debug(
    command: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(ZeroDivisionError("of\nall things")))
    assert main(["train"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "ZeroDivisionError: of all things" in err and "--debug" in err


@pytest.mark.parametrize("argv", [["--debug", "train"], ["train", "--debug"]])
def test_debug_prints_the_traceback(
    command: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    command(raising(ConfigError("wrong")))
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and err.endswith("mvlm: error: wrong\n")


def test_debug_below_a_nested_subcommand_and_behind_a_separator(
    command: Callable[..., ModuleType],
    seen: list[argparse.Namespace],
    record: Callable[[argparse.Namespace], int],
) -> None:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        nested = parser.add_subparsers(required=True).add_parser("build")
        nested.add_argument("rest", nargs="*")

    command(record, add_arguments)
    assert main(["train", "build", "a", "--debug"]) == 0
    assert main(["train", "build", "--", "--debug"]) == 0
    assert [(args.debug, args.rest) for args in seen] == [(True, ["a"]), (False, ["--debug"])]


def test_options_may_stand_anywhere_below_a_nested_subcommand(
    command: Callable[..., ModuleType],
    seen: list[argparse.Namespace],
    record: Callable[[argparse.Namespace], int],
) -> None:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        nested = parser.add_subparsers(dest="which", required=True).add_parser("show")
        nested.add_argument("recipe")
        nested.add_argument("overrides", nargs="*")
        nested.add_argument("--rows", type=int)
        nested.set_defaults(of_nested=True)

    command(record, add_arguments)
    assert main(["train", "show", "r", "--rows", "2", "a=1"]) == 0
    assert main(["train", "show", "--rows", "2", "r", "a=1"]) == 0
    for args in seen:
        assert (args.which, args.recipe, args.rows, args.overrides) == ("show", "r", 2, ["a=1"])
        assert args.of_nested


def test_options_may_stand_between_recipe_and_overrides(
    command: Callable[..., ModuleType],
    seen: list[argparse.Namespace],
    record: Callable[[argparse.Namespace], int],
) -> None:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("recipe")
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--ranks", type=int)

    command(record, add_arguments)
    assert main(["train", "r", "--ranks", "2", "a=1", "b=2"]) == 0
    assert main(["train", "r"]) == 0
    assert (seen[0].recipe, seen[0].ranks, seen[0].overrides) == ("r", 2, ["a=1", "b=2"])
    assert seen[1].overrides == []


def test_a_broken_pipe_that_is_not_stdout_is_told(
    command: Callable[..., ModuleType], capfd: pytest.CaptureFixture[str]
) -> None:
    command(raising(BrokenPipeError(32, "Broken pipe")))
    assert main(["train"]) == 1
    assert "BrokenPipeError" in capfd.readouterr().err


def test_wrong_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("trian") == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: mvlm")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export", "a", "b", "--overwite"), "arguments: --overwite; did you mean --overwrite?"),
        (("export", "a", "b", "--dtpye=keep"), "did you mean --dtype?"),
        (("export", "a", "b", "c"), "mvlm export: error: unrecognized arguments: c;"),
        (("export", "a", "b", "--dtype", "half"), "argument --dtype: invalid choice: 'half'"),
        (("export", "a"), "mvlm export: error: the following arguments are required: HF_DIR;"),
        (("plan",), "mvlm plan: error: the following arguments are required: RECIPE;"),
        (("data", "build", "a", "b", "--tokeniser", "c"), "did you mean --tokenizer?"),
        (("data", "build"), "mvlm data build: error: the following arguments are required"),
    ],
)
def test_a_wrong_option_is_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(*words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.endswith(" --help\n"), err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("--version") == 0
    assert capsys.readouterr().out.strip() == f"mvlm {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_tells_its_purpose_and_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = subcommand_module(name)
    assert module.HELP.strip().splitlines()[0].endswith(".")
    assert exit_of(name, "--help") == 0
    out = capsys.readouterr().out
    assert f"mvlm {name}" in out.partition("example")[2]


@pytest.mark.parametrize("argv", [["--help"], ["config", "--help"], ["doctor", "--help"]])
def test_help_is_instant_and_lists_every_command(argv: list[str]) -> None:
    code = (
        "import sys; from megatron_vlm.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], check=True, capture_output=True, text=True
        )
        after = os.times()
        # Processor time, not the clock's: the machine may be busy with other things.
        seconds.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    assert min(seconds) < 0.5
    if argv == ["--help"]:
        assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_config_prints_what_reproduces_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", str(recipe), "training.train_iters=11"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["training"]["train_iters"] == 11
    copy = tmp_path / "copy.yaml"
    copy.write_text(printed)
    assert load_recipe(copy) == load_recipe(recipe, ["training.train_iters=11"])


def test_config_of_a_wrong_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(recipe), "training.seq_len=1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mvlm: error: unknown key training.seq_len") and err.count("\n") == 1


def test_a_reader_that_has_enough_is_no_error(recipe: Path) -> None:
    line = f"{sys.executable} -m megatron_vlm config {recipe} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], check=False, capture_output=True, text=True)
    assert done.stdout.startswith("run_dir:") and done.stderr == ""
