"""The demo from start to end: build, ask, train, ask again, show.

Training is an ordinary run whose ranks are started as `mvlm launch` starts them; only the data and
the marking are special.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from megatron_vlm.checkpoint.folder import (
    find_checkpoint,
    list_iterations,
    read_state,
    write_atomically,
)
from megatron_vlm.config import RunConfig, dump_yaml
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.index import open_dataset
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.demo.dataset import build
from megatron_vlm.demo.folder import ANSWERS, RESULT, DemoFolder, claim
from megatron_vlm.demo.settings import demo_config, fitting_overrides, processes_on_cpu
from megatron_vlm.demo.sheet import SheetRow, digit_accuracy, exact_match, write_sheet
from megatron_vlm.demo.tokens import train_tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.platform.local_launch import (
    FAILED,
    TERMINATED,
    local_processes,
    run_local_ranks,
    train_command,
)

# Our choice: what is drawn in seconds and lasts for several epochs of a demo.
_TRAIN_SAMPLES, _HELD_OUT_SAMPLES = 8000, 300
_LONGEST_ANSWER = 32
_READING = "digits_read"
_READING_GRID = "digits_read_grid"


@dataclass(frozen=True)
class Answered:
    """One held-out question with the model's answer."""

    kind: str
    picture: Path
    question: str
    expected: str
    given: str


def run_demo(
    run_dir: Path, nproc: int | None, overrides: Sequence[str], samples: int | None
) -> int:
    """Run the whole demo below `run_dir`; returns the exit code.

    Args:
        run_dir: everything goes here; a demo that was interrupted goes on, a finished one restarts.
        nproc: training processes; null for one a GPU, without GPUs two (one on a single core).
        overrides: `key=value` for the recipe.
        samples: training pictures; null for the demo's own number, or that of the demo that was
            interrupted here.

    Returns:
        0 when the model has learned, 1 when training failed or taught it nothing, 2 when a rank
        met wrong input, 130 or 143 when it was interrupted.

    Raises:
        UserError: the folder, an override or a number does not fit. Raised before anything is
            written or removed, but for what is wrong with the data.
    """
    started = time.perf_counter()
    console = Console(highlight=False, markup=False)
    if samples is not None and samples < 1:
        raise ConfigError(f"--samples {samples}: expected 1 or more")
    count = local_processes(nproc, on_cpu=processes_on_cpu())
    config = demo_config(run_dir, count, overrides)
    folder = claim(run_dir)
    number = _train_samples(folder, samples)
    if folder.finished:
        folder.clear()
    data = run_dir / "data"
    _title(console, "1/4 Data: digits, photographs and text become pictures with questions")
    if folder.samples != number or not (data / "held_out" / "dataset.json").is_file():
        folder.note_samples(None)
        _build_data(data, number)
        folder.note_samples(number)
    _check_data(config)
    held_out = json.loads((data / "source" / "heldout.json").read_text())

    _title(console, "2/4 Before training: the model answers questions about held-out pictures")
    before = _answers(config, data, held_out, checkpoint=None)
    _report(console, before)

    _title(console, f"3/4 Training on {count} process{'es' * (count > 1)}")
    code = _train(config, count)
    if code == 0 and (reached := _iteration(run_dir)) < config.training.train_iters:
        # Ranks that were asked to stop have saved and ended well, but the demo is not over.
        console.print(
            f"stopped at iteration {reached} of {config.training.train_iters}; the same command "
            "goes on from there"
        )
        return TERMINATED
    if code != 0:
        return code

    _title(console, "4/4 After training: the same questions")
    after = _answers(config, data, held_out, checkpoint=run_dir)
    _report(console, after)
    _write_sheet(run_dir / "answers.png", after)
    write_atomically(run_dir / ANSWERS, json.dumps(_listed(after, run_dir), indent=1) + "\n")
    result = _result(before, after, *_training_seconds(run_dir))
    write_atomically(run_dir / RESULT, json.dumps(result, indent=2) + "\n")
    fitting = fitting_overrides(count, overrides)
    example = next((answer.picture for answer in after if answer.kind == _READING_GRID), None)
    seconds = time.perf_counter() - started
    _farewell(console, run_dir, result, seconds, count, fitting, example)
    if result["digit_accuracy_after"] > result["digit_accuracy_before"]:
        return 0
    print(
        f"mvlm demo: the model learned nothing in {config.training.train_iters} steps: digit "
        f"accuracy {result['digit_accuracy_after']:.1%} after training; if those are the recipe's "
        f"own number, look at {run_dir / 'logs'} and run `mvlm doctor`",
        file=sys.stderr,
    )
    return FAILED


def _train_samples(folder: DemoFolder, asked: int | None) -> int:
    """How many training samples this demo has."""
    if folder.finished:
        return asked or _TRAIN_SAMPLES
    number = asked or folder.samples or _TRAIN_SAMPLES
    if number != folder.samples and list_iterations(folder.path / "checkpoints"):
        raise ConfigError(
            f"--samples {number}: the demo that was interrupted in {folder.path} trains on "
            f"{folder.samples}; leave out --samples to go on, or name another --run-dir"
        )
    return number


def _build_data(data: Path, train_samples: int) -> None:
    source = data / "source"
    print(build(source, seed=0, train_samples=train_samples, heldout_samples=_HELD_OUT_SAMPLES))
    tokenizer = data / "tokenizer.json"
    entries = json.loads((source / "train.json").read_text())
    texts = (turn["value"] for entry in entries for turn in entry["conversations"])
    train_tokenizer(tokenizer, (text.replace("<image>", "").strip() for text in texts))
    learned = Tokenizer.load(tokenizer)
    for name, file in (("train", "train.json"), ("held_out", "heldout.json")):
        build_dataset(
            source / file,
            data / name,
            form="conversations",
            tokenizer=learned,
            overwrite=True,
            show_progress=True,
        )


def _check_data(config: RunConfig) -> None:
    """Raises UserError when the run could not train on its data."""
    from megatron_vlm.training.datasets import open_held_out_data, open_training_data

    open_held_out_data(config, open_training_data(config))


def _answers(
    config: RunConfig, data: Path, held_out: list[dict[str, Any]], checkpoint: Path | None
) -> list[Answered]:
    # Imports the engine: only now, so that building the data starts at once.
    from megatron_vlm.evaluation.generate import Answerer, Question

    source = data / "source"
    questions = [
        Question(entry["conversations"][0]["value"], ((source / entry["image"]).read_bytes(),))
        for entry in held_out
    ]
    tokenizer = Tokenizer.load(open_dataset(data / "held_out").tokenizer_path)
    with Answerer(config, tokenizer, checkpoint) as answerer, _bar() as bar:
        task = bar.add_task("answering", total=len(questions))
        given = answerer.answer(
            questions, _LONGEST_ANSWER, on_batch=lambda done: bar.advance(task, done)
        )
    return [
        Answered(
            kind=entry["kind"],
            picture=source / entry["image"],
            question=entry["conversations"][0]["value"].replace("<image>", "").strip(),
            expected=entry["conversations"][1]["value"],
            given=answer,
        )
        for entry, answer in zip(held_out, given, strict=True)
    ]


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def _train(config: RunConfig, count: int) -> int:
    """Train to the end or until asked to stop; returns the launcher's exit code."""
    run_dir = Path(config.run_dir)
    recipe = run_dir / "config.yaml"
    write_atomically(recipe, dump_yaml(config))
    # What was printed comes before what the ranks print.
    sys.stdout.flush()
    command = train_command(str(recipe.resolve()), [])
    return run_local_ranks(command, count, run_dir / "logs")


def _iteration(run_dir: Path) -> int:
    """How far the run has come."""
    return int(read_state(find_checkpoint(run_dir))["progress"]["iteration"])


def _training_seconds(run_dir: Path) -> tuple[float, float]:
    """Seconds that all steps took, those before an interruption too, and those of them in which
    ranks waited for data."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return sum(step["step_time_s"] for step in steps), sum(step["data_time_s"] for step in steps)


def _pairs(answers: Sequence[Answered], kinds: str = "") -> list[tuple[str, str]]:
    return [(a.expected, a.given) for a in answers if a.kind.startswith(kinds)]


def _report(console: Console, answers: Sequence[Answered]) -> None:
    groups: dict[str, list[Answered]] = defaultdict(list)
    for answer in answers:
        groups[answer.kind].append(answer)
    for kind, members in sorted(groups.items()):
        text = f"  {kind:<22} {exact_match(_pairs(members)):6.1%} of {len(members)} answers right"
        if kind.startswith(_READING):
            text += f", {digit_accuracy(_pairs(members)):6.1%} of digits in place"
        console.print(text)
    console.print(
        f"  digits read right, in place: {digit_accuracy(_pairs(answers, _READING)):.1%}; "
        f"whole answers right: {exact_match(_pairs(answers)):.1%}"
    )


def _listed(answers: Sequence[Answered], run_dir: Path) -> list[dict[str, str]]:
    """Every held-out answer; pictures as paths below the run folder."""
    return [
        {**asdict(answer), "picture": str(answer.picture.relative_to(run_dir))}
        for answer in answers
    ]


def _by_kind(answers: Sequence[Answered]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({answer.kind for answer in answers}):
        members = [answer for answer in answers if answer.kind == kind]
        found[kind] = {"questions": len(members), "exact_match": exact_match(_pairs(members))}
        if kind.startswith(_READING):
            found[kind]["digit_accuracy"] = digit_accuracy(_pairs(members))
    return found


def _result(
    before: list[Answered], after: list[Answered], seconds: float, waited: float
) -> dict[str, Any]:
    return {
        "digit_accuracy_before": digit_accuracy(_pairs(before, _READING)),
        "digit_accuracy_after": digit_accuracy(_pairs(after, _READING)),
        "exact_match_before": exact_match(_pairs(before)),
        "exact_match_after": exact_match(_pairs(after)),
        "train_seconds": round(seconds, 1),
        "data_time_share": round(waited / seconds, 4) if seconds else 0.0,
        "after_by_kind": _by_kind(after),
    }


def _write_sheet(path: Path, answers: Sequence[Answered]) -> None:
    from PIL import Image

    # Every kind is seen: one of each in turn, in the order of the held-out set.
    queues: dict[str, list[Answered]] = defaultdict(list)
    for answer in answers:
        queues[answer.kind].append(answer)
    ordered = [
        members[place]
        for place in range(max(map(len, queues.values())))
        for members in queues.values()
        if place < len(members)
    ]
    rows = []
    for answer in ordered[:24]:
        with Image.open(answer.picture) as picture:
            rows.append(
                SheetRow(picture.convert("RGB"), answer.question, answer.expected, answer.given)
            )
    write_sheet(path, rows, "Held-out pictures: what was asked, expected and answered")


def _title(console: Console, text: str) -> None:
    console.rule(Text(text, style="bold"), align="left")


def _farewell(
    console: Console,
    run_dir: Path,
    result: dict[str, Any],
    seconds: float,
    count: int,
    fitting: Sequence[str],
    example: Path | None,
) -> None:
    _title(console, "Done")
    fitted = "".join(f" {word}" for word in fitting)
    picture = "PICTURE" if example is None else shlex.quote(str(example))
    mvlm, tensorboard = (shlex.quote(_command(name)) for name in ("mvlm", "tensorboard"))
    console.print(
        f"Digits of held-out pictures read right, in place: "
        f"{result['digit_accuracy_before']:.1%} before, {result['digit_accuracy_after']:.1%} after "
        f"{result['train_seconds']:.0f} s of training steps. Whole answers: "
        f"{result['exact_match_before']:.1%} before, {result['exact_match_after']:.1%} after. "
        f"This call took {seconds:.0f} s.\n"
        f"  answers     {run_dir / 'answers.png'}\n"
        f"  numbers     {run_dir / RESULT}, {run_dir / ANSWERS}, {run_dir / 'metrics.jsonl'}\n"
        f"  curves      {tensorboard} --logdir {shlex.quote(str(run_dir / 'tensorboard'))}\n"
        f"  checkpoint  {run_dir / 'checkpoints'}\n"
        "Next:\n"
        f"  {mvlm} generate --checkpoint {shlex.quote(str(run_dir))} --image {picture} "
        '--prompt "Which digits, left to right?"\n'
        "Your own pictures and questions, from this model (its tokenizer and its weights):\n"
        f"  {mvlm} data build YOUR.json datasets/yours --tokenizer "
        f"{shlex.quote(str(run_dir / 'data' / 'tokenizer.json'))}\n"
        f"  {mvlm} launch demo --nproc {count}{fitted} data.train=datasets/yours "
        f"run_dir=runs/yours checkpoint.load={shlex.quote(str(run_dir))} "
        "checkpoint.load_optimizer=false",
        soft_wrap=True,
    )


def _command(name: str) -> str:
    """How to call a command of this installation from here, whether or not it is on the path."""
    if shutil.which(name):
        return name
    beside = Path(sys.executable).with_name(name)
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return str(beside)
