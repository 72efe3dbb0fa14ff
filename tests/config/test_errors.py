"""Each mistake in a configuration is one line that names the key, the value and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.config.messages import known_keys, nearest_keys
from megatron_vlm.errors import ConfigError

pytestmark = pytest.mark.unit

RECIPE = """
model:
  vision: {num_layers: 1, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 128}
  language: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 128,
             vocab_size: 384}
training: {train_iters: 3, seq_length: 128, global_batch_size: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def lines(recipe: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, list(overrides))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.seq_len=64", ["training.seq_len", "64", "did you mean training.seq_length"]),
        ("seq_length=64", ["unknown key seq_length", "training.seq_length"]),
        ("optimizer.learning_rate=1", ["optimizer.learning_rate", "optimizer.lr"]),
        ("optimiser.lr=1", ["unknown key optimiser", "optimizer"]),
        ("model.language.num_layer=3", ["model.language.num_layer ", "model.language.num_layers"]),
        ("training.zzzz=1", ["training.zzzz", "known here: train_iters, seq_length"]),
        ("training.train_iters=many", ["training.train_iters", '"many"', "valid integer"]),
        ("training.train_iters=1.5", ["training.train_iters is 1.5", "valid integer"]),
        ("training.train_iters=true", ["training.train_iters is true", "valid integer"]),
        ("training.train_iters=0", ["training.train_iters is 0", "greater than 0"]),
        ("optimizer.lr=fast", ["optimizer.lr", '"fast"', "valid number"]),
        ("run_dir=7", ["run_dir is 7", "text (put it in quotes)"]),
        ("data.shuffle=1", ["data.shuffle is 1", "true or false"]),
        ("training.precision=bf17", ["training.precision", "'bf17'", "mean 'bf16'"]),
        ("training.freeze=[vision,tail]", ["training.freeze[1]", '"tail"', "'adapter'"]),
        ("training.freeze=vision", ["training.freeze", '"vision"', "a list"]),
        ("optimizer=null", ["optimizer is null", "a mapping with the keys lr, "]),
        ("model.language.num_attention_heads=5", ["model.language:", "hidden_size 64"]),
        ("run_dir=${nowhere}", ["run_dir", "nowhere"]),
        ("run_dir=${run_dir}", ["run_dir", "ecursive"]),
        ("run_dir=???", ["run_dir has no value", "run_dir=VALUE"]),
        ("run_dir=[1,", ["override run_dir=[1,"]),
        ("run_dir", ["override 'run_dir'", "key=value"]),
        ("=7", ["override '=7'", "key=value"]),
        ("data.validation={1: x}", ["key 1", "quotes"]),
        ("data.validation.b=null", ["data.validation holds no 'b' to take away", "nothing"]),
        ("data.validation={b: null}", ["data.validation.b is null", "text"]),
        ("training.seed=18446744073709551616", ["training.seed is 18446744073709551616", "less"]),
        ("training.seed=9223372036854775808", ["training.seed", "less than 9223372036854775808"]),
        ("optimizer.min_lr=1", ["optimizer: min_lr 1.0 exceeds lr 0.0003"]),
        ("model.vision.image_std=[1,0,1]", ["model.vision.image_std[1] is 0", "greater than 0"]),
        ("data.num_workers=0", ["data.num_workers is 0", "greater than 0"]),
        (
            "data.train.talk={path: x, wieght: 2}",
            ["unknown key data.train.talk.wieght", "did you mean data.train.talk.weight or"],
        ),
        ("model=nowhere", ["no model named 'nowhere'", "shipped models"]),
        ("model=no/where.yaml", ["no/where.yaml does not exist", "shipped models"]),
        ("model=5", ["model is 5", "a mapping"]),
        ("run_dir=!!python/name:os.system x", ["python/name:os.system"]),
    ],
)
def test_one_line_with_all_that_is_needed(recipe: Path, override: str, expected: list[str]) -> None:
    said = lines(recipe, override)
    assert len(said) == 1, said
    normal = said[0].replace('"bf17"', "'bf17'")
    missing = [part for part in expected if part not in normal]
    assert not missing, said[0]


def test_every_mistake_gets_its_line_and_its_source(recipe: Path) -> None:
    recipe.write_text(RECIPE + "optimizer: {lr: -1}\n")
    said = lines(recipe, "training.micro_batch=2", "training.seed=x")
    assert len(said) == 3
    by_key = {line.split(" is ")[0].removeprefix("unknown key ").split()[0]: line for line in said}
    assert str(recipe) in by_key["optimizer.lr"]
    assert "override training.seed=x" in by_key["training.seed"]
    assert "override training.micro_batch=2" in by_key["training.micro_batch"]


def test_missing_field_says_what_it_is(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("train_iters: 3, ", ""))
    (line,) = lines(recipe)
    assert line.startswith("training.train_iters is required (Optimizer steps of the whole run)")


def test_missing_model(recipe: Path) -> None:
    recipe.write_text("training: {train_iters: 3, seq_length: 128, global_batch_size: 2}\n")
    (line,) = lines(recipe)
    assert line.startswith("model.language is required")


def test_missing_recipe_names_those_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    for name in ("proof", "pretrain"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(RECIPE)
    monkeypatch.setattr("megatron_vlm.config.shipped.configs_dir", lambda: tmp_path)
    assert load_recipe("proof") == load_recipe(tmp_path / "recipes" / "proof.yaml")
    assert "did you mean proof?" in lines("prof")[0]
    assert lines("nothing")[0].endswith("shipped recipes: pretrain, proof")
    assert "is a folder" in lines(tmp_path)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"training: [1,\n", "line 2"),
        (b"- 1\n- 2\n", "expected `key: value` lines"),
        (b"run_dir: a\nrun_dir: b\n", "duplicate"),
        (b"\xff\xfe\xfa", "recipe.yaml"),
        (b"!!python/object/apply:os.system [true]\n", "os.system"),
        (b"run_dir: !!binary aGVsbG8=\n", "plain YAML"),
    ],
)
def test_broken_file_is_named(recipe: Path, text: bytes, expected: str) -> None:
    recipe.write_bytes(text)
    (line,) = lines(recipe)
    assert expected in line


def test_nearest_keys_are_known_keys() -> None:
    known = set(known_keys(RunConfig))
    assert {"model.vision.num_layers", "training", "data.pad_multiple"} <= known
    assert set(nearest_keys("model.visoin.num_layers", RunConfig)) <= known
    assert nearest_keys("lr", RunConfig) == ["optimizer.lr"]
    assert nearest_keys("qqqqqq", RunConfig) == []
