"""The demo from start to end: build, ask, train, ask again, show.

Training is an ordinary run started by `mvlm launch`; only the data and the marking are special.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.index import open_dataset
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.demo.dataset import build
from megatron_vlm.demo.sheet import SheetRow, digit_accuracy, exact_match, write_sheet
from megatron_vlm.demo.tokens import train_tokenizer
from megatron_vlm.errors import UserError

RECIPE = "demo"
RESULT = "result.json"
# Our choice: what is drawn in seconds and lasts for several epochs of a demo.
_TRAIN_SAMPLES, _HELD_OUT_SAMPLES = 8000, 300
_LONGEST_ANSWER = 32
_READING = "digits_read"


@dataclass(frozen=True)
class Answered:
    """One held-out question with the model's answer."""

    kind: str
    picture: Path
    question: str
    expected: str
    given: str


def run_demo(run_dir: Path, nproc: int, overrides: Sequence[str], samples: int | None) -> int:
    """Run the whole demo below `run_dir`; returns the exit code.

    Args:
        run_dir: everything goes here; a demo that was interrupted goes on, a finished one restarts.
        nproc: training processes.
        overrides: `key=value` for the recipe.
        samples: training pictures; null for the demo's own number.
    """
    started = time.perf_counter()
    console = Console(highlight=False)
    if (run_dir / RESULT).exists():
        _clear(run_dir)
    data = run_dir / "data"
    _title(console, "1/4 Data: digits, photographs and text become pictures with questions")
    if not (data / "held_out" / "dataset.json").is_file():
        _build_data(data, samples or _TRAIN_SAMPLES)
    words = [
        f"run_dir={run_dir}",
        f"data.train={data / 'train'}",
        f"data.validation.held_out={data / 'held_out'}",
        *overrides,
    ]
    config = load_recipe(RECIPE, words)
    held_out = json.loads((data / "source" / "heldout.json").read_text())

    _title(console, "2/4 Before training: the model answers questions about held-out pictures")
    before = _answers(config, data, held_out, checkpoint=None)
    _report(console, before)

    _title(console, f"3/4 Training on {nproc} processes")
    training = time.perf_counter()
    code = _train(words, nproc)
    seconds = time.perf_counter() - training
    if code != 0:
        return code

    _title(console, "4/4 After training: the same questions")
    after = _answers(config, data, held_out, checkpoint=run_dir)
    _report(console, after)
    sheet = run_dir / "answers.png"
    _write_sheet(sheet, after)
    result = _result(before, after, seconds)
    (run_dir / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    _farewell(console, run_dir, result, time.perf_counter() - started)
    return 0


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
            source / file, data / name, tokenizer=learned, overwrite=True, show_progress=True
        )


def _clear(run_dir: Path) -> None:
    """Make room for a new run; the data are kept."""
    for name in ("checkpoints", "tensorboard", "logs"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("metrics.jsonl", "config.yaml", "answers.png", RESULT):
        (run_dir / name).unlink(missing_ok=True)


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


def _train(words: Sequence[str], nproc: int) -> int:
    command = [sys.executable, "-m", "megatron_vlm", "launch", RECIPE, "--nproc", str(nproc)]
    with subprocess.Popen([*command, *words]) as launcher:
        while True:
            try:
                return launcher.wait()
            except KeyboardInterrupt:
                # The launcher has heard it too: it saves a checkpoint, then ends.
                continue


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


def _result(before: list[Answered], after: list[Answered], seconds: float) -> dict[str, float]:
    return {
        "digit_accuracy_before": digit_accuracy(_pairs(before, _READING)),
        "digit_accuracy_after": digit_accuracy(_pairs(after, _READING)),
        "exact_match_before": exact_match(_pairs(before)),
        "exact_match_after": exact_match(_pairs(after)),
        "train_seconds": round(seconds, 1),
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
    console.rule(f"[bold]{text}", align="left")


def _farewell(console: Console, run_dir: Path, result: dict[str, float], seconds: float) -> None:
    console.rule("[bold]Done", align="left")
    console.print(
        f"Digits of held-out pictures read right, in place: "
        f"{result['digit_accuracy_before']:.1%} before, {result['digit_accuracy_after']:.1%} after "
        f"{result['train_seconds']:.0f} s of training. Whole answers: "
        f"{result['exact_match_before']:.1%} before, {result['exact_match_after']:.1%} after. "
        f"The demo took {seconds:.0f} s.\n"
        f"  answers     {run_dir / 'answers.png'}\n"
        f"  numbers     {run_dir / RESULT}, {run_dir / 'metrics.jsonl'}\n"
        f"  curves      tensorboard --logdir {run_dir / 'tensorboard'}\n"
        f"  checkpoint  {run_dir / 'checkpoints'}\n"
        "Next:\n"
        f"  mvlm generate --checkpoint {run_dir} --image PICTURE "
        '--prompt "Which digits, left to right?"\n'
        "  mvlm data build YOUR.json datasets/yours     your own pictures and questions\n"
        "  mvlm launch demo --nproc 2 data.train=datasets/yours run_dir=runs/yours",
        soft_wrap=True,
    )
    if result["digit_accuracy_after"] <= result["digit_accuracy_before"]:
        raise UserError(
            f"the demo learned nothing: digit accuracy {result['digit_accuracy_after']:.1%} after "
            f"training; look at {run_dir / 'logs'} and run `mvlm doctor`"
        )
