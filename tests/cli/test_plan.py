"""`mvlm plan`: tables, JSON, counts of devices, errors; fast because it imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.config import load_recipe
from megatron_vlm.errors import ConfigError
from megatron_vlm.topology.layout import resolve_layout
from tests.training_case import RECIPE

pytestmark = pytest.mark.unit

PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
TP2 = "parallel.tensor_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", str(RECIPE), *words])
    out, err = capsys.readouterr()
    return code, out, err


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, err = plan(capsys, "--json", *words)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_holds_every_stage_and_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, "--nproc", "8", PP2, VPP2, TP2, EP2)
    assert found["layout"] == "TP2 PP2 VPP2 EP2 DP2 SP"
    assert found["tokens_per_step"] == 4 * 128 and found["micro_batches"] == 2
    assert [stage["layers"] for stage in found["stages"]] == [[0, 2], [1, 3]]
    assert [stage["chunks"] for stage in found["stages"]] == [["Et", "t"], ["t", "tL"]]
    for stage in found["stages"]:
        sizes = dict(stage["bytes_per_rank"])
        assert sizes.pop("total") == sum(sizes.values())
        assert set(sizes) == {
            "weights",
            "gradients",
            "optimizer",
            "decoder",
            "logits",
            "encoder",
            "features",
        }
        # float64: a weight and its gradient are 8 bytes each, Adam's moments 16.
        count = stage["parameters_per_rank"]["total"]
        assert (sizes["weights"], sizes["optimizer"]) == (8 * count, 16 * count)
    most = max(stage["bytes_per_rank"]["total"] for stage in found["stages"])
    assert found["worst"]["bytes"] == most
    ranks = found["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(8))
    assert ranks[5] == {"rank": 5, "tp": 1, "cp": 0, "dp": 0, "pp": 1, "ep": 1, "etp": 0}
    assert ranks[found["worst"]["rank"]]["pp"] == found["worst"]["pipeline_rank"]


def test_tables_show_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--nproc", "4", PP2, "training.seq_length=512")
    found = plan_json(capsys, *words)
    code, out, _ = plan(capsys, *words)
    assert code == 0
    lines = out.splitlines()
    # Sentences come first, and run on.
    assert all(len(line) <= 80 for line in lines[lines.index("") :])
    for stage in found["stages"]:
        sizes = stage["bytes_per_rank"]
        kinds = [size for name, size in sizes.items() if name != "total"]
        row = [f"{size / 2**20:.2f}" for size in (*kinds, sizes["total"])]
        assert any(line.split() == [str(stage["pipeline_rank"]), *row] for line in lines)
        assert f"{stage['parameters_per_rank']['total']:,}" in out
    worst = found["worst"]
    assert f"most: {worst['bytes'] / 2**20:.2f} MiB on each rank of stage" in out
    assert "embedding, 0-1" in out and "2-3, loss" in out
    assert f"{found['parameters']['active']:,} active" in out
    layout = [line.split() for line in lines[lines.index("layout") + 2 :]]
    assert layout == [[str(r[key]) for key in r] for r in found["ranks"]]


def test_many_ranks_are_not_all_printed(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(capsys, "--nproc", "64", "training.global_batch_size=64")
    assert "32 more ranks: --json lists them all" in out


def test_nodes_times_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    by_nodes = plan_json(capsys, "--nodes", "2", "--gpus-per-node", "4", TP2)
    assert by_nodes == plan_json(capsys, "--nproc", "8", TP2)
    assert plan_json(capsys, "--gpus-per-node", "4")["world_size"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give either --nproc N, or --nodes N with --gpus-per-node N"),
        (("--nodes", "2"), "give either --nproc N"),
        (("--nproc", "8", "--gpus-per-node", "4"), "give either --nproc N"),
        (("--nproc", "8", "--nodes", "2"), "goes with --gpus-per-node"),
        (("--nproc", "1", "--picture-tokens", "129"), "expected 0 to 128"),
        (("--nproc", "1", "--sample-tokens", "129"), "expected 1 to 128"),
    ],
)
def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    code, out, err = plan(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("mvlm: error: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nproc", "0"), "--nproc: '0'; expected a whole number above 0"),
        (("--nproc", "abc"), "--nproc: 'abc'; expected a whole number above 0"),
        (("--nproc", "1", "--expert-imbalance", "nan"), "'nan'; expected a number from 1"),
        (("--nproc", "1", "--expert-imbalance", "x"), "'x'; expected a number from 1"),
    ],
)
def test_numbers_out_of_range(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(RECIPE), *words])
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_layout_errors_come_out_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    override = "parallel.expert_model_parallel_size=3"
    with pytest.raises(ConfigError) as caught:
        resolve_layout(load_recipe(str(RECIPE), [override]), 3)
    assert plan(capsys, "--nproc", "3", override) == (2, "", f"mvlm: error: {caught.value}\n")


def test_assumptions_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plain = plan_json(capsys, "--nproc", "2", EP2)
    assert plain["picture_tokens_per_row"] == 64
    other = plan_json(
        capsys, "--nproc", "2", EP2, "--picture-tokens", "32", "--expert-imbalance", "1.5"
    )
    before, after = (each["stages"][0]["bytes_per_rank"] for each in (plain, other))
    assert after["encoder"] == pytest.approx(before["encoder"] / 2, abs=1)
    assert after["decoder"] > before["decoder"]
    cpu = plan_json(capsys, "--nproc", "2", EP2, "--device", "cpu")
    assert cpu["stages"][0]["bytes_per_rank"]["encoder"] > before["encoder"]
    context = ("--nproc", "2", "parallel.context_parallel_size=2")
    row, sample = (
        plan_json(capsys, *context, *words)["stages"][0]["bytes_per_rank"]["decoder"]
        for words in ((), ("--sample-tokens", "16"))
    )
    assert sample < row


def test_no_torch(tmp_path: object) -> None:
    code = (
        "import sys; from megatron_vlm.cli.main import main\n"
        f"code = main(['plan', {str(RECIPE)!r}, '--nproc', '4'])\n"
        "sys.exit(code or {'torch', 'numpy', 'megatron'} & set(sys.modules) != set())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
