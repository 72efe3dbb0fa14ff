"""What a recipe may say of its training data, and the one line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vlm.config import dump_yaml, load_recipe
from megatron_vlm.errors import ConfigError

pytestmark = pytest.mark.unit


def recipe(folder: Path, **data: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": "dots-vlm-nano",
                "training": {"train_iters": 1, "seq_length": 64, "global_batch_size": 1},
                "data": data,
            }
        )
    )
    return path


def test_a_path_alone_is_a_source(tmp_path: Path) -> None:
    config = load_recipe(recipe(tmp_path, train="sets/a"))
    assert {name: source.path for name, source in config.data.train.items()} == {"train": "sets/a"}
    mixed = load_recipe(recipe(tmp_path, train={"a": "sets/a", "b": {"path": "b", "repeat": 2.0}}))
    assert [(s.path, s.repeat) for s in mixed.data.train.values()] == [("sets/a", 1.0), ("b", 2.0)]
    # An override of the whole replaces it, one of a name adds to it or takes it away.
    path = recipe(tmp_path, train={"a": "sets/a", "b": "sets/b"})
    assert set(load_recipe(path, ["data.train=other"]).data.train) == {"train"}
    assert set(load_recipe(path, ["data.train.c=sets/c"]).data.train) == {"a", "b", "c"}
    assert set(load_recipe(path, ["data.train.a=null"]).data.train) == {"b"}
    assert load_recipe(path, ["data.train.a.max_epochs=2"]).data.train["a"].max_epochs == 2


def test_a_mixture_comes_back_from_its_own_text(tmp_path: Path) -> None:
    schedule = [{"tokens": 100, "weights": {"a": 1.0}, "ramp_tokens": 50}]
    train = {
        "a": {"path": "sets/a", "weight": 0.5},
        "b": {"path": "sets/b", "weight": 1.5, "untie": {"probability": 0.8}},
    }
    config = load_recipe(recipe(tmp_path, train=train, schedule=schedule))
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_recipe(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": {"a": {"path": "a", "weight": 1}, "b": "b"}}, ["train.b has no weight"]),
        ({"train": {"a": {"path": "a", "weight": 0}}}, ["every weight is 0"]),
        ({"train": {"a": {"path": "a", "weight": 1, "repeat": 2}}}, ["a weight and a repeat"]),
        ({"train": {"a": {"path": "a", "weight": -1}}}, ["data.train.a.weight is -1", "0"]),
        ({"train": {"a": {"path": "a", "wieght": 1}}}, ["data.train.a.wieght", "weight"]),
        ({"train": {"a": {}}}, ["data.train.a.path", "required"]),
        ({"train": 3}, ["data.train is 3"]),
        (
            {"train": {"a": "a"}, "schedule": [{"tokens": 9, "weights": {"c": 1}}]},
            ["schedule[0].weights names 'c'", "a"],
        ),
        (
            {"train": {"a": "a"}, "schedule": [{"tokens": 9, "weights": {"a": 0}}]},
            ["schedule[0].weights", "above 0"],
        ),
        (
            {
                "train": {"a": "a"},
                "schedule": [{"tokens": n, "weights": {"a": 1}} for n in (9, 9)],
            },
            ["schedule[1].tokens 9 is not beyond"],
        ),
        ({"train": {"a": "a"}, "long_samples": "cut"}, ["data.long_samples", "split"]),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe(tmp_path, **data))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
