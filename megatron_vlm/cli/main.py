"""The door: finds the subcommand, imports it alone, and turns what it raises into an exit code.

A subcommand is a module of this folder with `HELP: str` (its purpose in one line, then an
example), `add_arguments(parser) -> None` and `run(args) -> int`. Nothing heavy may be imported at
the top of such a module: its `--help` should answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import keyword
import os
import re
import select
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from megatron_vlm import __version__
from megatron_vlm.errors import TaskFailed, UserError

COMMANDS = {
    "demo": "train and check a tiny model on this machine, from real pictures, in minutes",
    "doctor": "show what this machine has and whether training can run on it",
    "data": "build data sets of pictures, videos, documents and text, and look at them",
    "config": "print the resolved configuration of a recipe",
    "plan": "predict the memory of a recipe on a number of devices, without a GPU",
    "train": "train: the process that torchrun, srun or mpirun starts for each device",
    "launch": "start a training run on this machine, one process for each device",
    "submit": "send a training run to Slurm as a job that recovers by itself",
    "status": "show how a supervised run is doing, and what has happened to it",
    "supervise": "run on the nodes of a Slurm job, and start again whatever fails",
    "agent": "start and watch the ranks of one node: what supervise starts everywhere",
    "timeline": "draw what every rank did in a step that a run has recorded",
    "generate": "answer questions about pictures from a checkpoint",
    "import": "turn a Hugging Face folder into a checkpoint",
    "export": "turn a checkpoint into a Hugging Face folder",
    "release": "publish intermediate checkpoints of a run, each with a card and its training state",
}
"""Every subcommand, in the order a newcomer meets them: the module's name and its purpose."""

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""As shells report a process that ended on SIGINT."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line; nested parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        """Leave with that line, and with the nearest option to one that there is not."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            for word in unknown.split():
                near = difflib.get_close_matches(word.partition("=")[0], _options(self), n=1)
                if word.startswith("-") and near:
                    message += f"; did you mean {near[0]}?"
                    break
        # The engine of options counts those that may be left out among them.
        required = re.compile(r"^(the following arguments are required: .*?), key=value$")
        message = required.sub(r"\1", message)
        said = " ".join(message.split())
        self.exit(
            EXIT_USER_ERROR,
            f"{self.prog}: error: {said}{'' if said.endswith('?') else ';'} see {self.prog} "
            "--help\n",
        )


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Options of a parser and of those that nest in it."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                found += _options(nested)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `mvlm` command line (default: this process's) and return its exit code.

    0: done. 1: failed. 2: the input was wrong. 130: interrupted. `argparse` leaves by SystemExit
    (0 for --help and --version, 2 for a wrong command line).
    """
    own, command, rest = _split(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # Subcommands nest, so --debug is taken out here rather than declared on every level.
    debug = "--debug" in own or "--debug" in _before_separator(rest)
    parser.parse_args(own)
    if command is None:
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        parser.error(f"there is no command {command!r}; {hint}")
    try:
        return _run(command, rest, debug)
    except (UserError, TaskFailed) as error:
        _print_traceback(debug)
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"mvlm: error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    except KeyboardInterrupt:
        _print_traceback(debug)
        print("mvlm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_has_no_reader():
            # `| head` has enough. Python would flush stdout once more on the way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILED
        _print_traceback(debug)
        advice = "" if debug else " (--debug shows the traceback)"
        said = " ".join(str(error).split())
        name = type(error).__name__
        print(f"mvlm: {name}{': ' if said else ''}{said}{advice}", file=sys.stderr)
        return EXIT_FAILED


def _run(command: str, rest: Sequence[str], debug: bool) -> int:
    module = subcommand_module(command)
    args = _parse(_subcommand_parser(command, module), _without_debug(rest))
    args.debug = debug
    code = int(module.run(args))
    sys.stdout.flush()
    return code


def subcommand_module(command: str) -> ModuleType:
    """The module of a subcommand; a word of Python's own gets an underscore."""
    name = f"{command}_" if keyword.iskeyword(command) else command
    return importlib.import_module(f"megatron_vlm.cli.{name}")


def _subcommand_parser(command: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"mvlm {command}",
        description=module.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse with options and positionals in any order where argparse can.

    Plain argparse refuses `RECIPE --option key=value`: it settles the overrides, a list of any
    length, at the first positional. Its intermixed mode in turn refuses nested subcommands, which
    are therefore gone into here, and remainders, and loses what a `--` tells.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words and "--" not in words:
            nested = action.choices.get(words[0])
            if nested is not None:
                args = _parse(nested, words[1:])
                if action.dest != argparse.SUPPRESS:
                    setattr(args, action.dest, words[0])
                return args
    if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in parser._actions):
        return parser.parse_args(words)
    return parser.parse_intermixed_args(words)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    parser = _Parser(
        prog="mvlm",
        usage="mvlm [-h] [--version] [--debug] COMMAND ...",
        description="Train vision-language mixture-of-experts models.",
        epilog=f"commands:\n{listing}\n\n`mvlm COMMAND --help` tells more, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mvlm {__version__}")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="show the traceback of an error (before or after COMMAND)",
    )
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """What stands before the command, the command, what follows it."""
    for place, word in enumerate(argv):
        if not word.startswith("-"):
            return list(argv[:place]), word, list(argv[place + 1 :])
    return list(argv), None, []


def _before_separator(words: Sequence[str]) -> list[str]:
    """The words up to `--`; what follows belongs to another program."""
    words = list(words)
    return words[: words.index("--")] if "--" in words else words


def _without_debug(words: Sequence[str]) -> list[str]:
    before = _before_separator(words)
    return [word for word in before if word != "--debug"] + list(words[len(before) :])


def _stdout_has_no_reader() -> bool:
    """Whether stdout is a pipe that nobody reads any more; other pipes break too."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _print_traceback(debug: bool) -> None:
    if debug:
        traceback.print_exc()
