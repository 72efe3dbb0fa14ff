"""A run's releases, verified: what lies in them, and that transformers alone loads them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from megatron_vlm.checkpoint.folder import digest
from megatron_vlm.checkpoint.verify import verify_files
from megatron_vlm.config import load_recipe
from megatron_vlm.planning.shapes import model_parameters
from tests.data.samples import encoded, picture
from tests.release.commands import (
    checked_by_coreutils,
    metrics,
    plainly,
    released,
    state,
)
from tests.release.folders import read_tensors
from tests.release.test_hub_models import run_outside
from tests.training_case import train_case

pytestmark = pytest.mark.distributed

ITERATIONS = (2, 4, 6)


def _folders(releases: dict) -> list[Path]:
    return sorted(path for path in releases["folder"].iterdir() if path.is_dir())


def test_one_for_each_multiple_that_has_a_checkpoint(vlm_run: Path, vlm_releases: dict) -> None:
    assert vlm_releases["code"] == 0, vlm_releases["err"]
    tokens = [metrics(vlm_run)[number]["consumed_tokens"] for number in ITERATIONS]
    multiples = [count // 400 for count in tokens]
    missing = [k * 400 for k in range(1, multiples[-1]) if k not in multiples]
    assert missing, "choose N so that some have none"
    report = json.loads(vlm_releases["out"])
    # In hundreds of tokens, nothing is abbreviated but thousands.
    assert [name.split("-")[1] for name in report["made"]] == [
        f"iter_{number:07d}" for number in ITERATIONS
    ]
    assert [path.name for path in _folders(vlm_releases)] == report["made"]
    told = [k for first, last in report["missing"] for k in range(first, last + 1, 400)]
    assert told == missing
    assert vlm_releases["err"].count("not released, since no checkpoint was kept") == len(
        report["missing"]
    )
    assert not [p for p in vlm_releases["folder"].iterdir() if p.name.startswith(".")]


def test_state_and_card_say_what_the_run_wrote(vlm_run: Path, vlm_releases: dict) -> None:
    steps = metrics(vlm_run)
    for iteration, folder in zip(ITERATIONS, _folders(vlm_releases), strict=True):
        checkpoint = vlm_run / "checkpoints" / f"iter_{iteration:07d}"
        facts, card = state(folder), ModelCard.load(folder / "README.md")
        step, config = steps[iteration], load_recipe(checkpoint / "config.yaml")
        assert facts["iteration"] == iteration and facts["stage"] == "first light"
        assert facts["consumed"]["tokens"] == step["consumed_tokens"]
        assert facts["consumed"]["documents"] == step["consumed_documents"]
        assert facts["consumed"]["rows"] == step["consumed_samples"]
        assert facts["learning_rate"]["value"] == step["learning_rate"]
        assert facts["losses"]["training"] == {
            name: step[name] for name in ("lm_loss", "load_balancing_loss")
        }
        evaluated = {4: 3, 6: 6}.get(iteration)
        assert facts["losses"]["validation"] == {
            name: {"value": steps[evaluated][name], "iteration": evaluated}
            for name in ("validation_loss_held_out", "validation_loss")
            if evaluated
        }
        assert facts["batch"]["rows"] == 4 and facts["batch"]["tokens_at_most"] == 4 * 128
        assert facts["source"]["manifest_sha256"] == digest(checkpoint / "manifest.json")
        assert facts["optimizer"] == config.optimizer.model_dump(mode="json")
        tensors = read_tensors(folder).values()
        assert facts["export"]["parameters"] == sum(t.numel() for t in tensors)
        assert facts["model"]["parameters"]["total"] == model_parameters(config.model).total
        assert facts["config"]["training"] == config.training.model_dump(mode="json")
        assert load_recipe(folder / "training_config.yaml").model == config.model
        record = json.loads((Path(config.data.train["train"].path) / "dataset.json").read_text())
        (training_set,) = facts["data"]["train"]
        for name in ("content_sha256", "samples", "pictures", "text_tokens"):
            assert training_set[name] == record[name]
        assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "image-text-to-text"
        assert "mixture-of-experts" in card.data.tags
        for value in (
            f"{step['consumed_tokens']:,} exactly",
            f"| {step['lm_loss']:.4f} | {iteration} |",
            f"{step['learning_rate']:.6g} (from metrics.jsonl)",
            "| Stage | first light |",
            "Apache-2.0",
            training_set["content_sha256"][:16],
            "max relative difference",
            "AutoModelForImageTextToText",
            "mvlm import",
        ):
            assert value in card.content, value
        if evaluated:
            value = steps[evaluated]["validation_loss_held_out"]
            assert f"| {value:.4f} | {evaluated} |" in card.content
        else:
            assert "No held-out set was evaluated up to here" in card.content
        with Image.open(folder / "loss_curve.png") as image:
            assert image.width > 500
        assert checked_by_coreutils(folder) == len(facts["files"]) + 1


def test_no_path_of_this_machine_is_published(vlm_run: Path, vlm_releases: dict) -> None:
    for path in vlm_releases["folder"].rglob("*"):
        if path.suffix in (".md", ".json", ".yaml"):
            assert str(vlm_run.parent) not in path.read_text(), path
            assert str(vlm_releases["folder"].parent) not in path.read_text(), path


def test_index_has_all(vlm_run: Path, vlm_releases: dict) -> None:
    steps, folder = metrics(vlm_run), vlm_releases["folder"]
    entries = json.loads((folder / "collection.json").read_text())["releases"]
    readme = ModelCard.load(folder / "README.md").content
    for iteration, entry, path in zip(ITERATIONS, entries, _folders(vlm_releases), strict=True):
        assert entry["release"] == path.name and entry["iteration"] == iteration
        assert entry["tokens"] == steps[iteration]["consumed_tokens"]
        assert entry["learning_rate"] == steps[iteration]["learning_rate"]
        assert entry["training_losses"]["lm_loss"] == steps[iteration]["lm_loss"]
        assert entry["verified"] is True
        total = sum(file.stat().st_size for file in path.iterdir())
        small = ("SHA256SUMS", "training_state.json")
        assert entry["bytes"] == total - sum((path / name).stat().st_size for name in small)
        (row,) = (line for line in readme.splitlines() if f"[{path.name}]" in line)
        assert f"({path.name}/README.md)" in row
        assert f"lm_loss {steps[iteration]['lm_loss']:.4f}" in row
        assert ("validation_loss_held_out" in row) == (iteration > 2)


def test_verified_as_measured(vlm_releases: dict) -> None:
    for folder in _folders(vlm_releases):
        found = state(folder)["verification"]
        # Measured 3e-7 to 6e-7 on all families of models.
        assert 0 < found["max_relative_difference"] < 5e-6 < found["tolerance"] <= 1e-4
        assert found["pictures"] == 1
        # Even so small a model has tokens whose experts are a matter of rounding.
        assert 0.8 * found["positions"] < found["compared"] <= found["positions"] == 168


@pytest.mark.slow
def test_each_card_runs_where_only_transformers_is(vlm_releases: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(vlm_releases["folder"], out)
    blocks = []
    for folder in _folders({"folder": out}):
        (folder / "picture.png").write_bytes(encoded(picture(40, 60)))
        card = (folder / "README.md").read_text()
        blocks.append(f"import os\nos.chdir({str(folder)!r})\n")
        blocks += re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
        blocks.append(f"print('ran', {folder.name!r})\n")
    (out / "cards.py").write_text("".join(blocks))
    done = run_outside(out, "example", out, "cards.py")
    assert len(re.findall(r"^ran nano-iter_000000[246]-", done.stdout, re.MULTILINE)) == 3


@pytest.mark.slow
def test_text_alone_rounded(text_run: Path, tmp_path: Path) -> None:
    """Of an fp32 run, as bfloat16: the newest, without held-out sets, none of whose metrics are."""
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    (run / "metrics.jsonl").unlink()
    code, out, err = released(run, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size=1MB")
    assert code == 0, err
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    facts, card = state(folder), ModelCard.load(folder / "README.md")
    assert "1 made, 0 there already" in out and folder.name.startswith(
        "dots-vlm-nano-iter_0000006-"
    )
    assert facts["verification"]["max_relative_difference"] < 5e-6
    assert facts["verification"]["pictures"] == 0 and facts["export"]["dtype"] == "bfloat16"
    tensors = read_tensors(folder)
    assert {t.dtype for n, t in tensors.items() if "correction_bias" not in n} == {torch.bfloat16}
    # The schedule knows what the metrics do not.
    assert facts["learning_rate"] | {"schedule": {}} == {
        "value": 3e-3,
        "from": "the schedule",
        "schedule": {},
        "in_words": "2 steps of linear warm-up to 0.003, then constant",
    }
    assert facts["losses"] == {"metrics_found": False, "training": {}, "validation": {}}
    assert facts["data"]["validation"] == {} and facts["stage"] is None
    assert not (folder / "loss_curve.png").exists() and "loss_curve" not in card.content
    assert "Not known: the run's metrics.jsonl was not there." in card.content
    assert "| Stage | not named |" in card.content and "None was given" in card.content
    assert card.data.license == "other" and card.data.pipeline_tag == "text-generation"
    assert "AutoModelForCausalLM" in card.content
    assert "those of the trainer with these same weights (bfloat16, rounded" in card.content
    assert "| Weights in these files | bfloat16, rounded from float32, " in card.content
    checked_by_coreutils(folder)


@pytest.mark.slow
def test_finer_weights_are_compared_with_finer_weights(vlm_run: Path, tmp_path: Path) -> None:
    words = ("--iterations", "4", "--dtype", "float32")
    code, _, err = released(vlm_run, tmp_path / "out", *words)
    assert code == 0, err
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert state(folder)["verification"]["max_relative_difference"] < 5e-6
    coarse = tmp_path / "coarse"
    assert plainly(vlm_run, coarse, "--iterations", "4")[0] == 0
    mine, other = (
        read_tensors(folder),
        read_tensors(next(p for p in coarse.iterdir() if p.is_dir())),
    )
    name = "model.embed_tokens.weight"
    assert not torch.equal(mine[name], other[name].float())


def test_training_goes_on_exactly_from_a_release(vlm_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert plainly(vlm_run, out, "--iterations", "4", "--with-optimizer")[0] == 0
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    checkpoint = vlm_run / "checkpoints" / "iter_0000004"
    verify_files(folder / "checkpoint")
    inode = (checkpoint / ".metadata").stat().st_ino
    assert (folder / "checkpoint" / ".metadata").stat().st_ino == inode
    checked_by_coreutils(folder)
    before = load_recipe(checkpoint / "config.yaml")
    words = [
        f"run_dir={tmp_path / 'continued'}",
        f"data.train={before.data.train['train'].path}",
        f"data.validation.held_out={before.data.validation['held_out']}",
        f"checkpoint.load={folder / 'checkpoint'}",
    ]
    run = train_case(load_recipe(folder / "training_config.yaml", words))
    steps = metrics(vlm_run)
    assert [line["iteration"] for line in run.metrics] == [5, 6]
    for line in run.metrics:
        for name in ("lm_loss", "grad_norm", "consumed_tokens", "learning_rate"):
            assert line[name] == steps[line["iteration"]][name], name


def test_a_checkpoint_is_copied_where_links_are_not_possible(
    vlm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    assert plainly(vlm_run, tmp_path / "out", "--with-optimizer")[0] == 0
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    verify_files(folder / "checkpoint")
    checked_by_coreutils(folder)


def test_a_release_is_imported_again(vlm_releases: dict, tmp_path: Path) -> None:
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    folder = _folders(vlm_releases)[0]
    import_folder(folder, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    mine, again = read_tensors(folder), read_tensors(tmp_path / "again")
    assert mine.keys() == again.keys()
    assert all(torch.equal(mine[name], again[name]) for name in mine)
