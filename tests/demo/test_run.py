"""The demo from start to end: refusals before anything happens, interruption, going on, results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vlm.demo import run as demo
from megatron_vlm.demo.folder import RESULT, claim
from megatron_vlm.demo.run import Answered, run_demo
from megatron_vlm.errors import ConfigError
from megatron_vlm.platform.local_launch import TERMINATED


@pytest.mark.unit
@pytest.mark.parametrize(
    ("nproc", "words", "samples", "said"),
    [
        (0, [], None, "--nproc 0"),
        (3, ["parallel.tensor_model_parallel_size=2"], None, "3 processes cannot hold"),
        (2, ["data.train=mine"], None, "data of its own"),
        (2, [], 0, "--samples 0"),
        (2, [], -3, "--samples -3"),
    ],
)
def test_refused_before_anything_is_written_or_removed(
    tmp_path: Path, nproc: int, words: list[str], samples: int | None, said: str
) -> None:
    folder = claim(tmp_path / "run")
    (folder.path / RESULT).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=said):
        run_demo(folder.path, nproc, words, samples)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match=said):
        run_demo(tmp_path / "new", nproc, words, samples)
    assert not (tmp_path / "new").exists()


@pytest.mark.unit
def test_samples_of_an_interrupted_demo_stay_and_a_new_one_has_its_own(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    assert demo._train_samples(folder, None) == 8000
    assert demo._train_samples(folder, 5) == 5
    folder.note_samples(70)
    assert demo._train_samples(folder, None) == 70
    # Nothing has been trained yet: the data can still be made anew.
    assert demo._train_samples(folder, 90) == 90
    checkpoint = tmp_path / "checkpoints" / "iter_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert demo._train_samples(folder, None) == demo._train_samples(folder, 70) == 70
    with pytest.raises(ConfigError, match="--samples 90: .* trains on 70"):
        demo._train_samples(folder, 90)
    (tmp_path / RESULT).write_text("{}")
    assert demo._train_samples(folder, None) == 8000
    assert demo._train_samples(folder, 90) == 90


class Stand:
    """Stands in for the parts of the demo that take minutes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[int] = []
        self.before, self.after = "0", "4"
        self.code, self.reached = 0, 300
        monkeypatch.setattr(demo, "_build_data", self._build)
        monkeypatch.setattr(demo, "_check_data", lambda config: None)
        monkeypatch.setattr(demo, "_answers", self._answers)
        monkeypatch.setattr(demo, "_iteration", lambda run_dir: self.reached)
        monkeypatch.setattr(demo, "run_local_ranks", self._train)

    def _build(self, data: Path, samples: int) -> None:
        self.built.append(samples)
        for name in ("source/heldout.json", "held_out/dataset.json"):
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).write_text("[]")
        Image.new("RGB", (28, 28)).save(data / "picture.png")

    def _train(self, command: list[str], count: int, logs: Path) -> int:
        assert Path(command[-1]).is_file()
        times = ((1.5, 0.25), (2, 0.1))
        lines = [json.dumps({"step_time_s": step, "data_time_s": data}) for step, data in times]
        (logs.parent / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return self.code

    def _answers(self, config: Any, data: Path, held_out: Any, checkpoint: Any) -> list[Answered]:
        given = self.before if checkpoint is None else self.after
        return [Answered("digits_read_grid", data / "picture.png", "Which?", "4", given)]


@pytest.mark.unit
def test_a_run_that_was_stopped_is_not_shown_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand = Stand(monkeypatch)
    # As after SIGTERM: every rank has saved and ended well.
    stand.reached = 299
    assert run_demo(tmp_path / "run", 1, [], 50) == TERMINATED
    out = capsys.readouterr().out
    assert "stopped at iteration 299 of 300" in out and "4/4" not in out
    assert not (tmp_path / "run" / RESULT).exists()
    # It goes on with the data it has.
    stand.reached = 300
    assert run_demo(tmp_path / "run", 1, [], None) == 0
    result = json.loads((tmp_path / "run" / RESULT).read_text())
    assert stand.built == [50]
    assert (result["digit_accuracy_before"], result["digit_accuracy_after"]) == (0, 1)
    # All steps, not those since the last interruption.
    assert (result["train_seconds"], result["data_time_share"]) == (3.5, 0.1)
    # Finished, it starts anew: with the demo's own number of samples.
    (tmp_path / "run" / "checkpoints").mkdir()
    assert run_demo(tmp_path / "run", 1, [], None) == 0
    assert stand.built == [50, 8000] and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.unit
def test_an_interrupted_build_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(monkeypatch)
    assert run_demo(tmp_path / "run", 1, [], 50) == 0

    def fail(data: Path, samples: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "_build_data", fail)
        run_demo(tmp_path / "run", 1, [], 60)
    assert run_demo(tmp_path / "run", 1, [], 50) == 0
    assert stand.built == [50, 50]


@pytest.mark.unit
def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand = Stand(monkeypatch)
    stand.after = "5"
    assert run_demo(tmp_path / "run", 1, [], 50) == 1
    err = capsys.readouterr().err
    assert "learned nothing" in err and err.count("\n") == 1
    stand.code = 130
    assert run_demo(tmp_path / "run", 1, [], 50) == 130


@pytest.mark.unit
def test_names_in_brackets_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Stand(monkeypatch)
    assert run_demo(tmp_path / "a [b] c", 3, [], 50) == 0
    out = capsys.readouterr().out
    assert f"--checkpoint '{tmp_path}/a [b] c' --image" in out
    assert "--nproc 3 parallel.expert_model_parallel_size=1 training.micro_batch_size=2" in out


@pytest.mark.distributed
@pytest.mark.slow
def test_stopped_by_a_signal_and_taken_up_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run #2"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(*words: str) -> list[str]:
        return [
            *(sys.executable, "-m", "megatron_vlm", "demo", "--run-dir", str(run_dir)),
            *("--nproc", "2", "optimizer.lr_warmup_iters=0", "training.eval_interval="),
            # A smaller model, whose 300 answers take seconds.
            *("model.language.num_layers=2", "model.language.hidden_size=64"),
            *("model.vision.num_layers=1", "model.vision.hidden_size=64", *words),
        ]

    def steps() -> list[dict[str, Any]]:
        file = run_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    first = command("--samples", "60", "training.train_iters=100000")
    with subprocess.Popen(
        first, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        end = time.monotonic() + 240
        while not steps():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == TERMINATED, err
    done = len(steps())
    assert f"stopped at iteration {done} of 100000" in out and not (run_dir / RESULT).exists()

    again = subprocess.run(
        command(f"training.train_iters={done + 40}"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"resumed at iteration {done}" in again.stdout, again.stderr
    assert [entry["iteration"] for entry in steps()] == list(range(1, done + 41))
    assert steps()[-1]["lm_loss"] < 0.7 * steps()[0]["lm_loss"]
    result = json.loads((run_dir / RESULT).read_text())
    learned = result["digit_accuracy_after"] > result["digit_accuracy_before"]
    assert again.returncode == (0 if learned else 1), again.stderr
    assert result["train_seconds"] == pytest.approx(
        sum(entry["step_time_s"] for entry in steps()), abs=0.1
    )
    waited = sum(entry["data_time_s"] for entry in steps())
    assert result["data_time_share"] == pytest.approx(
        waited / sum(entry["step_time_s"] for entry in steps()), abs=1e-4
    )
    with Image.open(run_dir / "answers.png") as sheet:
        assert sheet.width > 1000
    asked = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_vlm", "generate", "--checkpoint", str(run_dir)),
            *("--image", str(run_dir / "data/source/heldout/000001.png"), "--prompt", "What?"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.endswith("\n")
