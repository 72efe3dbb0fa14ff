"""Recipes, models and overrides become the configuration one would have written by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_vlm.config import (
    RunConfig,
    dump_yaml,
    find_recipes,
    load_recipe,
    with_absolute_paths,
)
from megatron_vlm.config.load import find_models, load_model
from megatron_vlm.errors import ConfigError

pytestmark = pytest.mark.unit

LANGUAGE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 128,
    "vocab_size": 384,
}
MODEL_YAML = (
    "name: tiny\n"
    "language: {num_layers: 2, hidden_size: 64, num_attention_heads: 4,\n"
    "           ffn_hidden_size: 128, vocab_size: 384}\n"
)
RECIPE_YAML = """
run_dir: runs/${model.name}
model: tiny.yaml
training: {train_iters: 3, seq_length: 128, global_batch_size: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(MODEL_YAML)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE_YAML)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def by_hand(**changes: object) -> RunConfig:
    values = {
        "run_dir": "runs/tiny",
        "model": {"name": "tiny", "language": LANGUAGE},
        "training": {"train_iters": 3, "seq_length": 128, "global_batch_size": 2},
    }
    return RunConfig.model_validate(values | changes)


def test_recipe_with_a_model_file_beside_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Elsewhere: the model's path is relative to the recipe, not to the working directory.
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_recipe(recipe) == by_hand()
    assert load_recipe(str(recipe)) == by_hand()


def test_overrides_change_exactly_what_they_name(recipe: Path) -> None:
    changed = load_recipe(
        recipe,
        [
            "training.train_iters=7",
            "optimizer.lr=1e-4",
            "model.language.num_layers=6",
            "data.validation.charts=held/charts",
            "training.freeze=[vision]",
            "training.train_iters=9",
        ],
    )
    expected = by_hand(
        model={"name": "tiny", "language": LANGUAGE | {"num_layers": 6}},
        training={
            "train_iters": 9,
            "seq_length": 128,
            "global_batch_size": 2,
            "freeze": ["vision"],
        },
        optimizer={"lr": 0.0001},
        data={"validation": {"charts": "held/charts"}},
    )
    assert changed == expected


def test_model_override_replaces_the_model_before_its_keys_change(
    recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text(
        RECIPE_YAML.replace("model: tiny.yaml", "model: {base: tiny.yaml, name: derived}")
    )
    other = write(tmp_path / "other.yaml", MODEL_YAML.replace("tiny", "other"))
    changed = load_recipe(recipe, ["model.language.num_layers=6", f"model={other}"])
    assert changed.model.name == "other"
    assert changed.model.language.num_layers == 6


def test_base_is_merged_under_the_mapping(recipe: Path, tmp_path: Path) -> None:
    write(tmp_path / "wide.yaml", "base: tiny.yaml\nlanguage: {hidden_size: 256, num_layers: 5}\n")
    recipe.write_text(
        RECIPE_YAML.replace("tiny.yaml", "{base: wide.yaml, name: mine, language: {num_layers: 9}}")
    )
    language = LANGUAGE | {"hidden_size": 256, "num_layers": 9}
    assert load_recipe(recipe) == by_hand(
        run_dir="runs/mine", model={"name": "mine", "language": language}
    )


def test_interpolation_sees_what_an_override_changed(recipe: Path) -> None:
    recipe.write_text(RECIPE_YAML + "checkpoint: {save_interval: '${training.train_iters}'}\n")
    assert load_recipe(recipe, ["training.train_iters=50"]).checkpoint.save_interval == 50


def test_empty_value_is_null_and_numbers_keep_their_kind(recipe: Path) -> None:
    config = load_recipe(recipe, ["data.train=", "optimizer.lr=1"])
    assert config.data.train == {}
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.validation={}"], {}),
        (["data.validation={b: y}"], {"b": "y"}),
        (["data={validation: {b: y}}"], {"b": "y"}),
        (["data.validation.b=y"], {"charts": "held/charts", "text": "held/text", "b": "y"}),
        (["data.validation[b]=y"], {"charts": "held/charts", "text": "held/text", "b": "y"}),
        (["data.validation.charts=null"], {"text": "held/text"}),
        (
            ["data.validation.text=", "data.validation.text=z"],
            {"charts": "held/charts", "text": "z"},
        ),
        (["data.validation={}", "data.validation.b=y"], {"b": "y"}),
        (["data={shuffle: false}"], {"charts": "held/charts", "text": "held/text"}),
    ],
)
def test_held_out_sets_of_a_recipe_can_be_added_to_replaced_and_taken_away(
    recipe: Path, overrides: list[str], expected: dict[str, str]
) -> None:
    held_out = "{charts: held/charts, text: held/text}"
    recipe.write_text(RECIPE_YAML + f"data: {{validation: {held_out}, pad_multiple: 8}}\n")
    data = load_recipe(recipe, overrides).data
    assert data.validation == expected
    assert data.pad_multiple == 8  # a section is merged, whatever the override


def test_sections_are_merged_when_overridden_as_a_whole(recipe: Path) -> None:
    training = load_recipe(recipe, ["training={train_iters: 8}"]).training
    assert (training.train_iters, training.seq_length) == (8, 128)


def test_what_a_run_saves_means_the_same_run_from_elsewhere(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home, elsewhere = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(home)
    overrides = ["data.train=sets/a", "data.validation.b=/sets/b", "data.validation.c=../c"]
    config = load_recipe(recipe, [*overrides, "checkpoint.load=old"])
    saved = write(tmp_path / "config.yaml", dump_yaml(with_absolute_paths(config)))
    monkeypatch.chdir(elsewhere)
    again = load_recipe(saved)
    assert again.run_dir == f"{home}/runs/tiny"
    assert again.data.train["train"].path == f"{home}/sets/a"
    assert again.data.validation == {"b": "/sets/b", "c": f"{home.parent}/c"}
    assert again.checkpoint.load == f"{home}/old"
    assert with_absolute_paths(again) == again
    # Nothing else has changed, and what was not given stays so.
    paths = {"run_dir", "data", "checkpoint"}
    assert again.model_dump(exclude=paths) == config.model_dump(exclude=paths)
    assert with_absolute_paths(by_hand()).data.train == {}
    assert with_absolute_paths(by_hand()).checkpoint.load is None


def test_a_chain_of_bases_that_closes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="based on itself"):
        load_model(tmp_path / "a.yaml")


def test_every_shipped_recipe_and_model_survives_the_round_trip(tmp_path: Path) -> None:
    for name in find_models():
        model = load_model(name)
        assert load_model(write(tmp_path / "model.yaml", dump_yaml(model))) == model, name
    for name in find_recipes():
        config = load_recipe(name)
        assert load_recipe(write(tmp_path / "recipe.yaml", dump_yaml(config))) == config, name


def test_round_trip_of_hostile_text_and_floats(tmp_path: Path) -> None:
    draw = random.Random(0)
    alphabet = list("${}\\:#'\"\n -é漢~a") + ["1e5", "${", "\\${", "\\\\${"]

    def text(most: int) -> str:
        return "".join(draw.choices(alphabet, k=draw.randint(1, most)))

    for _ in range(8):
        config = by_hand(
            run_dir=text(12),
            data={"validation": {text(6): text(30) for _ in range(60)}},
            optimizer={"lr": draw.random() * 10 ** draw.randint(-12, 3)},
        )
        assert load_recipe(write(tmp_path / "dump.yaml", dump_yaml(config))) == config


@pytest.mark.parametrize("text", ["true", "null", "1e-4", "0x1F", "2024-01-01", "12:30", ""])
def test_round_trip_of_text_that_looks_like_something_else(tmp_path: Path, text: str) -> None:
    config = by_hand(run_dir=text, data={"validation": {text: text}})
    assert load_recipe(write(tmp_path / "dump.yaml", dump_yaml(config))) == config
