"""Which recipes and models ship with the package, and how a name or a path finds its file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from megatron_vlm.errors import ConfigError

Kind = Literal["recipe", "model"]

_SUFFIXES = (".yaml", ".yml")


def configs_dir() -> Path:
    """The folder that holds `recipes/` and `models/`."""
    return _shipped("configs")


def batch_script() -> Path:
    """The Slurm batch script that trains a recipe."""
    return _shipped("slurm") / "train.sbatch"


def _shipped(name: str) -> Path:
    """A top-level folder of files that ship with the package.

    A wheel carries it inside the package; a checkout (and so an editable install) keeps it
    beside the package. The package's own comes first: beside an installed package lie the
    folders of strangers.
    """
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def find_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return _names("recipe")


def find_models() -> list[str]:
    """Names of the shipped models, sorted."""
    return _names("model")


def locate(kind: Kind, reference: str | Path, relative_to: Path) -> Path:
    """The YAML file that `reference` means.

    A `Path`, or text with a slash or a `.yaml` ending, is a file, relative to the folder
    `relative_to` unless absolute; any other text is the name of a shipped one. Raises ConfigError,
    which lists the shipped names, when there is no such file.
    """
    text = str(reference)
    if isinstance(reference, Path) or "/" in text or text.endswith(_SUFFIXES):
        path = relative_to / Path(text).expanduser()
        if path.is_file():
            return path
        problem = "is a folder, not a YAML file" if path.is_dir() else "does not exist"
        raise ConfigError(f"{kind} file {path} {problem}; {_offer(kind)}")
    path = configs_dir() / f"{kind}s" / f"{text}.yaml"
    if text in _names(kind):
        return path
    near = difflib.get_close_matches(text, _names(kind), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(f"there is no {kind} named {text!r}{hint}; {_offer(kind)}")


def _names(kind: Kind) -> list[str]:
    return sorted(path.stem for path in (configs_dir() / f"{kind}s").glob("*.yaml"))


def _offer(kind: Kind) -> str:
    names = ", ".join(_names(kind)) or "none"
    return f"give the path of a YAML file or one of the shipped {kind}s: {names}"
