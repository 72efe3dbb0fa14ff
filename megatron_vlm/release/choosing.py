"""Which checkpoints of a run are released: by consumed tokens, by iteration, or the newest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint import folder
from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.release.words import count_in_words

_IMPORTED = (
    "was imported, not trained; expected a run's folder; `mvlm export` gives an import back to "
    "Hugging Face"
)


@dataclass(frozen=True)
class Candidate:
    """A whole checkpoint of a run."""

    path: Path
    iteration: int
    tokens: int
    """Real tokens consumed so far."""
    state: dict[str, Any]
    """Its state.json."""


@dataclass(frozen=True)
class Choice:
    """What is released, and what cannot be."""

    candidates: list[Candidate]
    """Ascending."""
    missing: list[tuple[int, int]] = field(default_factory=list)
    """First and last token count of each range of multiples that no checkpoint stands for."""
    next_multiple: int | None = None
    """The first multiple that the run has not reached."""


def choose(
    run_dir: Path, every_tokens: int | None = None, iterations: Sequence[int] | None = None
) -> Choice:
    """Pick whole checkpoints under `run_dir/checkpoints`.

    Args:
        run_dir: a run folder.
        every_tokens: for each multiple of this many tokens, the first checkpoint at or beyond it.
        iterations: exactly these. Without either, the newest.

    Raises:
        CheckpointError: the folder holds no whole checkpoint, or one that was not trained.
        ConfigError: an iteration has no checkpoint, or no multiple was reached.
    """
    root = run_dir / "checkpoints"
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: no such folder; expected a run's")
    there = folder.list_iterations(root)
    if not there:
        raise CheckpointError(_no_run(run_dir))
    if iterations is not None:
        return Choice([_candidate(root, number) for number in _these(root, there, iterations)])
    newest = int(folder.find_checkpoint(root).name.removeprefix("iter_"))
    if every_tokens is None:
        return Choice([_candidate(root, newest)])
    # What lies beyond the newest is of a course that the run was set back from.
    found = [_candidate(root, number) for number in there if number <= newest]
    return _multiples(root, found, every_tokens)


def _no_run(path: Path) -> str:
    """What a folder is that has no `checkpoints/` with a whole one."""
    if (path / folder.MANIFEST).is_file():
        if "imported" in folder.read_state(path):
            return f"{path}: {_IMPORTED}"
        run, number = os.path.normpath(path / ".." / ".."), path.name.removeprefix("iter_")
        which = f" ({run} --iterations {int(number)})" if number.isdecimal() else ""
        return f"{path}: is a checkpoint; give its run's folder and --iterations{which}"
    if folder.list_iterations(path):
        return f"{path}: holds checkpoints; give the run's folder, which is the one above it"
    return (
        f"{path}: holds no whole checkpoint (checkpoints/iter_... with {folder.MANIFEST}); "
        "expected a run's folder"
    )


def _these(root: Path, there: list[int], wanted: Sequence[int]) -> list[int]:
    for number in wanted:
        if number not in there:
            raise ConfigError(
                f"--iterations {number}: {root} has no whole checkpoint of it; it has "
                f"{', '.join(map(str, there))}"
            )
    return sorted(set(wanted))


def _multiples(root: Path, found: list[Candidate], step: int) -> Choice:
    chosen: list[Candidate] = []
    missing: list[tuple[int, int]] = []
    reached = 0
    # By checkpoints, not by multiples: of those there may be billions.
    for candidate in found:
        multiple = candidate.tokens // step
        if multiple <= reached:
            continue
        if multiple > reached + 1:
            missing.append(((reached + 1) * step, (multiple - 1) * step))
        chosen.append(candidate)
        reached = multiple
    if not chosen:
        last = found[-1]
        raise ConfigError(
            f"--every-tokens {step}: no checkpoint has reached that many; the newest, {last.path}, "
            f"stands at {last.tokens} tokens"
        )
    return Choice(chosen, missing, (reached + 1) * step)


def describe_missing(choice: Choice, step: int) -> list[str]:
    """A line for each range of multiples without a checkpoint."""
    lines = []
    for first, last in choice.missing:
        count = (last - first) // step + 1
        which = (
            f"{count_in_words(first)} tokens"
            if count == 1
            else f"{count_in_words(first)} to {count_in_words(last)} tokens ({count} multiples)"
        )
        after = next(each for each in choice.candidates if each.tokens >= last)
        lines.append(
            f"{which}: not released, since no checkpoint was kept between there and the next "
            f"multiple; the first one beyond, iteration {after.iteration}, stands at "
            f"{count_in_words(after.tokens)} (checkpoint.keep_every keeps more)"
        )
    return lines


def _candidate(root: Path, iteration: int) -> Candidate:
    path = root / folder.checkpoint_name(iteration)
    state = folder.read_state(path)
    if "imported" in state:
        raise CheckpointError(f"{path}: {_IMPORTED}")
    try:
        progress = state["progress"]
        tokens, said = int(progress["consumed_tokens"]), int(progress["iteration"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path / folder.STATE}: tells no progress.iteration and progress.consumed_tokens; the "
            "checkpoint is damaged, use another"
        ) from None
    if said != iteration:
        raise CheckpointError(
            f"{path / folder.STATE}: says iteration {said}; expected {iteration}, as its folder "
            "does; rename the folder"
        )
    return Candidate(path, iteration, tokens, state)
