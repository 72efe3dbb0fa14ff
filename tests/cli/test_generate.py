"""`mvlm generate`: an answer on stdout, and one line for each thing that can be wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm.cli.main import main
from megatron_vlm.data.sources import media
from megatron_vlm.platform import World
from tests.ranks import run_ranks
from tests.training_case import recipe, train_case


@pytest.fixture(scope="module")
def checkpoint(nano_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the tests' model."""
    run_dir = tmp_path_factory.mktemp("run")
    train_case(recipe(nano_data, run_dir, "training.train_iters=3"))
    return run_dir


def _answer(world: World, run_dir: Path, picture: Path) -> str:
    from megatron_vlm.evaluation.generate import Answerer, Question

    with Answerer.from_checkpoint(run_dir) as answerer:
        (answer,) = answerer.answer([Question("ab?", (picture.read_bytes(),))], 8)
    return answer


@pytest.mark.distributed
def test_prints_the_answer(checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a picture.png"
    Image.new("RGB", (84, 56), "#5090c0").save(picture)

    def generate(image: Path) -> subprocess.CompletedProcess[str]:
        words = ("--checkpoint", str(checkpoint), "--image", str(image), "--prompt", "ab?")
        return subprocess.run(
            [*(sys.executable, "-m", "megatron_vlm", "generate"), *words, "--max-new-tokens", "8"],
            capture_output=True,
            text=True,
            check=False,
        )

    done = generate(picture)
    assert (done.returncode, done.stderr) == (0, "")
    assert [done.stdout] == [answer + "\n" for answer in run_ranks(1, _answer, checkpoint, picture)]
    notes = tmp_path / "notes.txt"
    notes.write_text("not a picture")
    wrong = generate(notes)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith(f"mvlm: error: --image {notes}: ")
    assert wrong.stderr.count("\n") == 1 and " at 0x" not in wrong.stderr


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--image", "/dev/zero"), "--image /dev/zero: is not a file"),
        (("--image", "/nowhere.png"), "--image /nowhere.png: cannot be read (No such file"),
        (("--image", "/"), "--image /: is not a file"),
        (("--image", "LARGE"), "16 bytes; expected a picture file of at most 15"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0: expected 1 or more"),
        (("--max-new-tokens", "-4"), "--max-new-tokens -4: expected 1 or more"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(media, "MAX_ENCODED_BYTES", 15)
    large = tmp_path / "large.png"
    large.write_bytes(bytes(16))
    given = [str(large) if word == "LARGE" else word for word in words]
    assert main(["generate", "--checkpoint", "runs/none", "--prompt", "what?", *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
