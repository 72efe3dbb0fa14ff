"""Which checkpoints are released, and how numbers of tokens are read and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.release.choosing import choose, describe_missing
from megatron_vlm.release.words import bytes_in_words, count_in_words, parse_count

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e12", 10**12),
        ("1T", 10**12),
        ("500B", 5 * 10**11),
        ("2M", 2 * 10**6),
        ("1.5t", 15 * 10**11),
        ("10k", 10_000),
        ("1_000", 1000),
        (" 7 ", 7),
        # Not what a float would make of it.
        ("1.1T", 1_100_000_000_000),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_counts_are_read(text: str, number: int) -> None:
    assert parse_count(text, "--every-tokens") == number


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1.5", "T", "1TB", "1e-3", "1..2", "_", ".", "nan", "inf", "1 T x", "9" * 5000],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--every-tokens .*expected a whole number"):
        parse_count(text, "--every-tokens")


def test_counts_are_written_short_and_never_rounded_up() -> None:
    written = {
        0: "0",
        999: "999",
        1000: "1K",
        1_019_999: "1.01M",
        12_399_999: "12.3M",
        999_999_999: "999M",
        10**12: "1T",
        11_200_000_000_000: "11.2T",
        1_234_000_000_000_000: "1234T",
    }
    assert {number: count_in_words(number) for number in written} == written
    assert [bytes_in_words(n) for n in (5, 1500, 3_214_000_000)] == ["5 bytes", "1.5 kB", "3.21 GB"]


def _run(folder: Path, tokens: dict[int, int], **state: object) -> Path:
    for iteration, count in tokens.items():
        path = folder / "checkpoints" / f"iter_{iteration:07d}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
        progress = {"iteration": iteration, "consumed_tokens": count}
        parts = {"model": {}, "precision": "bf16", "data": {}, "frozen": []}
        (path / "state.json").write_text(json.dumps({"progress": progress, **parts, **state}))
    return folder


KEPT = {100: 90, 200: 250, 300: 310, 400: 399, 500: 720, 600: 800}


def test_the_first_beyond_each_multiple(tmp_path: Path) -> None:
    run = _run(tmp_path, KEPT)
    choice = choose(run, every_tokens=100)
    # 250 stands for 200, 310 for 300, 720 for 700; 100 and 400 to 600 have none of their own.
    assert [c.iteration for c in choice.candidates] == [200, 300, 500, 600]
    assert choice.missing == [(100, 100), (400, 600)]
    assert choice.next_multiple == 900
    one, more = describe_missing(choice, 100)
    assert one.startswith("100 tokens: not released") and "iteration 200, stands at 250" in one
    assert more.startswith("400 to 600 tokens (3 multiples): ") and "keep_every" in more
    # A checkpoint exactly there counts.
    assert [c.tokens for c in choose(run, every_tokens=400).candidates] == [720, 800]


def test_billions_of_multiples_take_no_time(tmp_path: Path) -> None:
    choice = choose(_run(tmp_path, {1: 10**13, 2: 2 * 10**13}), every_tokens=1)
    assert [c.iteration for c in choice.candidates] == [1, 2]
    assert choice.missing == [(1, 10**13 - 1), (10**13 + 1, 2 * 10**13 - 1)]


def test_what_a_run_was_set_back_from_is_no_multiple(tmp_path: Path) -> None:
    run = _run(tmp_path, KEPT)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("400\n")
    assert [c.iteration for c in choose(run, every_tokens=200).candidates] == [200]
    assert [c.iteration for c in choose(run).candidates] == [400]
    assert [c.iteration for c in choose(run, iterations=[600, 100, 600]).candidates] == [100, 600]


def test_half_checkpoints_do_not_count(tmp_path: Path) -> None:
    run = _run(tmp_path, KEPT)
    (run / "checkpoints" / "iter_0000600" / "manifest.json").unlink()
    (run / "checkpoints" / ".incomplete-iter_0000700").mkdir()
    assert choose(run).candidates[0].iteration == 500


def test_faults_are_told(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", KEPT)
    with pytest.raises(ConfigError, match=r"--iterations 150: .* it has 100, 200, 300"):
        choose(run, iterations=[100, 150])
    with pytest.raises(ConfigError, match="no checkpoint has reached .* stands at 800 tokens"):
        choose(run, every_tokens=801)
    with pytest.raises(CheckpointError, match="no such folder"):
        choose(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        choose(tmp_path / "empty")
    imported = _run(tmp_path / "imported", {0: 0}, imported={"family": "dots1"})
    with pytest.raises(CheckpointError, match="was imported, not trained"):
        choose(imported)
    with pytest.raises(CheckpointError, match="import.* was imported, not trained"):
        choose(imported / "checkpoints" / "iter_0000000")
    checkpoint = run / "checkpoints" / "iter_0000100"
    with pytest.raises(CheckpointError, match=f"{checkpoint}: is a .*{run} --iterations 100"):
        choose(checkpoint)
    with pytest.raises(CheckpointError, match="holds checkpoints; give the run's folder"):
        choose(run / "checkpoints")
    odd = _run(tmp_path / "odd", {5: 1}, progress={"iteration": 6, "consumed_tokens": 1})
    with pytest.raises(CheckpointError, match="says iteration 6; expected 5"):
        choose(odd)
    bare = _run(tmp_path / "bare", {5: 1}, progress={})
    with pytest.raises(CheckpointError, match=r"tells no progress\.iteration"):
        choose(bare)
