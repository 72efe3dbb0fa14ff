"""From a recipe and `key=value` overrides to a checked `RunConfig`, and back to YAML.

A configuration is a pile of layers, each overlaid on the one before: the model's file (on the
models it is based on), the recipe, the overrides in the order given. Interpolations are resolved
once, on the finished pile, so that a recipe may refer to what an override changes. Sections are
merged key by key; so are mappings of free names, unless an override gives one as a whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_vlm.config.messages import Layer, Location, describe, named_mappings
from megatron_vlm.config.model_schema import ModelConfig
from megatron_vlm.config.schema import RunConfig
from megatron_vlm.config.shipped import find_models, find_recipes, locate
from megatron_vlm.errors import ConfigError

__all__ = [
    "dump_yaml",
    "find_models",
    "find_recipes",
    "load_model",
    "load_recipe",
    "load_values",
    "with_absolute_paths",
]

Section = TypeVar("Section", bound=BaseModel)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a recipe and overrides describe.

    `recipe` is the path of a YAML file or the name of a shipped recipe. Each override is
    `dotted.key=value`, the value in YAML; `key=` means null. `model=NAME` (or `model=FILE`)
    replaces the recipe's model and is applied before every `model.key=value`. A model's file that a
    recipe or a model names is looked for beside the file that names it; every other path
    (`data.train`, `data.validation`, `checkpoint.load`, `run_dir`, files in overrides) starts at
    the working directory. Raises ConfigError with one line for each mistake.
    """
    path = locate("recipe", recipe, Path())
    return _resolve(_read(path), path.parent, overrides)


def load_values(values: Mapping[str, Any], label: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that plain values and overrides describe: a recipe that lies in no file.

    Text in `values` is taken as it is; `label` is what errors call them. Raises ConfigError as
    `load_recipe` does.
    """
    return _resolve(Layer(label, _escape_interpolations(dict(values))), Path(), overrides)


def _resolve(layer: Layer, beside: Path, overrides: Sequence[str]) -> RunConfig:
    """A recipe's own layer, whose model is looked for `beside` it, under its overrides."""
    changes = [_parse_override(text) for text in overrides]
    models = [change for key, change in changes if key == "model"]
    if models:
        model, folder, label = models[-1].values["model"], Path(), models[-1].label
        layer.values.pop("model", None)
    else:
        model, folder, label = layer.values.pop("model", {}), beside, layer.label
    model_layers = [
        Layer(item.label, {"model": item.values}) for item in _model_layers(model, folder, label)
    ]
    rest = [change for key, change in changes if key != "model"]
    return _validate(RunConfig, [*model_layers, layer, *rest])


def load_model(model: str | Path) -> ModelConfig:
    """The model of a YAML file or of a shipped name. Raises ConfigError as `load_recipe` does."""
    return _validate(ModelConfig, _model_layers(model, Path(), "the call"))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whatever the working directory: paths that start there start at the root.

    This is what a run saves, so that its `config.yaml` means the same run from anywhere.
    """
    data, checkpoint = config.data, config.checkpoint
    return config.model_copy(
        update={
            "run_dir": os.path.abspath(config.run_dir),
            "data": data.model_copy(
                update={
                    "train": {
                        name: source.model_copy(update={"path": os.path.abspath(source.path)})
                        for name, source in data.train.items()
                    },
                    "validation": {
                        name: os.path.abspath(path) for name, path in data.validation.items()
                    },
                }
            ),
            "checkpoint": checkpoint.model_copy(
                update={"load": checkpoint.load and os.path.abspath(checkpoint.load)}
            ),
        }
    )


def dump_yaml(config: BaseModel) -> str:
    """The configuration as YAML with every default written out.

    Given back to `load_recipe` (or `load_model`), it yields the very same object.
    """
    plain = _escape_interpolations(config.model_dump(mode="json"))
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _read(path: Path) -> Layer:
    """One YAML file, interpolations not yet resolved. An empty file is an empty mapping."""
    try:
        loaded = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where} is not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path} as YAML: {_first_line(error)}") from error
    plain = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} holds a {type(plain).__name__}; expected `key: value` lines")
    return Layer(str(path), _text_keys(plain, str(path)))


def _parse_override(text: str) -> tuple[str, Layer]:
    """The key of one `key=value`, and the whole as a layer of its own."""
    key, equals, _ = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"override {text!r} is not of the form key=value "
            "(for example training.train_iters=100, or model=NAME)"
        )
    label = f"override {text}"
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"cannot read the value of {label}: {reason}") from error
    steps = tuple(step for step in re.split(r"[.\[\]]", key) if step)
    return key, Layer(label, _text_keys(cast("dict[Any, Any]", values), label), steps)


def _model_layers(
    model: Any, folder: Path, label: str, above: tuple[Path, ...] = ()
) -> list[Layer]:
    """A `model:` entry as layers, the deepest base first.

    `folder` is what paths are relative to, `label` names the entry in errors, `above` are the
    files whose `base` led here.
    """
    if isinstance(model, dict):
        own = dict(model)
        if "base" not in own:
            return [Layer(label, own)]
        below = _model_layers(own.pop("base"), folder, label, above)
        return [*below, Layer(label, own)]
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"model is {json.dumps(model)} ({label}); expected the name of a shipped model, "
            f"a YAML file or a mapping; shipped models: {', '.join(find_models()) or 'none'}"
        )
    try:
        path = locate("model", model, folder)
    except ConfigError as error:
        raise ConfigError(f"{error} ({label})") from error
    if path.resolve() in above:
        raise ConfigError(f"model {path} is based on itself ({label}); remove one `base`")
    layer = _read(path)
    return _model_layers(layer.values, path.parent, layer.label, (*above, path.resolve()))


def _validate(schema: type[Section], layers: Sequence[Layer]) -> Section:
    merged: dict[str, Any] = {}
    named = set(named_mappings(schema))
    for layer in layers:
        merged = _overlay(merged, _with_named_sources(layer.values), layer, named)
    try:
        plain = OmegaConf.to_container(
            OmegaConf.create(merged), resolve=True, throw_on_missing=True
        )
        text = json.dumps(plain)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ConfigError(f"{key} has no value yet (???); give it as {key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'a value'}: {_first_line(error)}") from error
    except TypeError as error:
        raise ConfigError(f"a value is not plain YAML: {_first_line(error)}") from error
    try:
        # Strict, so that `true` is no number and "8" no integer; as JSON, because strict Python
        # input would also refuse a list where the schema has a tuple.
        return schema.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error, schema, layers))) from error


def _with_named_sources(values: dict[str, Any]) -> dict[str, Any]:
    """The same with every path that stands for a source of `data.train` written out.

    Before layers are merged, so that one layer may say the path and another the weight.
    """
    data = values.get("data")
    if not isinstance(data, dict) or "train" not in data:
        return values
    train = data["train"]
    if isinstance(train, str):
        train = {"train": train}
    if isinstance(train, dict):
        train = {n: {"path": v} if isinstance(v, str) else v for n, v in train.items()}
    return {**values, "data": {**data, "train": {} if train is None else train}}


def _overlay(
    below: dict[str, Any],
    above: dict[str, Any],
    layer: Layer,
    named: Set[Location],
    place: Location = (),
) -> dict[str, Any]:
    """Mappings are merged key by key; anything else above replaces what is below.

    In a mapping of free names, one of `named`, an override may also replace the whole and take a
    name away: key by key, nothing could ever be taken out of what a recipe says.
    """
    merged = dict(below)
    for key, value in above.items():
        here = (*place, key)
        if value is None and place in named and layer.key == here:
            if key not in merged:
                known = ", ".join(merged) or "nothing"
                where = ".".join(map(str, place))
                raise ConfigError(
                    f"{layer.label}: {where} holds no {key!r} to take away; it holds {known}"
                )
            del merged[key]
            continue
        whole = here in named and 0 < len(layer.key) <= len(here)
        under = merged.get(key, {})
        if isinstance(value, dict) and isinstance(under, dict) and not whole:
            value = _overlay(under, value, layer, named, here)
        merged[key] = value
    return merged


def _text_keys(values: dict[Any, Any], label: str) -> dict[str, Any]:
    """The same mapping, having checked that every key on every level is text."""
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r} in {label} is not text; put it in quotes")
        if isinstance(value, dict):
            _text_keys(value, label)
    return values


def _escape_interpolations(value: Any) -> Any:
    """Text that holds a literal `${` survives a second loading only behind a backslash."""
    if isinstance(value, dict):
        return {key: _escape_interpolations(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape_interpolations(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
