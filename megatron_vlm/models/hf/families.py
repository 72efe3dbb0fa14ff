"""The families of models that weights are exchanged with, and which one a model belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError

from megatron_vlm.config.model_schema import ModelConfig
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf import deepseek_v3, dots1, dots_ocr, dots_vlm, own, qwen2
from megatron_vlm.models.hf.fields import Fields
from megatron_vlm.models.hf.names import NameMap


@dataclass(frozen=True)
class Family:
    """One class of models on the other side."""

    model_type: str
    """As config.json calls it."""
    architecture: str
    """The class."""
    names: NameMap
    read: Callable[[Fields, Sequence[Fields]], dict[str, Any]]
    """Our model's sections from config.json and, of encoders, the settings of pictures."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """config.json's fields from our model; refuses a trait that the class lacks."""
    sees: bool
    """Whether it has an encoder of pictures."""
    decoder: str
    """`model_type` of its decoder alone."""


def _language_only(module: Any, model_type: str) -> Family:
    """A family without pictures, from its file."""

    def read(fields: Fields, _: Sequence[Fields]) -> dict[str, Any]:
        return {"language": module.read_config(fields)}

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.vision is not None:
            raise ConversionError(
                f"model.vision is not null; {module.ARCHITECTURE} has no encoder of pictures"
            )
        return module.write_config(model.language)

    return Family(model_type, module.ARCHITECTURE, module.NAMES, read, write, False, model_type)


def _released(module: Any, model_type: str, decoder: str) -> Family:
    """A released family with an encoder, from its file."""
    return Family(
        model_type,
        module.ARCHITECTURE,
        module.NAMES,
        module.read_config,
        module.write_config,
        True,
        decoder,
    )


def _own(decoder: str) -> Family:
    """Ours with that decoder."""
    return Family(
        own.MODEL_TYPE,
        own.ARCHITECTURES[decoder],
        own.NAMES[decoder],
        partial(own.read_config, decoder),
        partial(own.write_config, decoder),
        True,
        decoder,
    )


# Released ones before our own, so that programs that serve those serve a model that is one.
FAMILIES = (
    _language_only(dots1, "dots1"),
    _language_only(deepseek_v3, "deepseek_v3"),
    _language_only(qwen2, "qwen2"),
    _released(dots_vlm, "dots_vlm", "deepseek_v3"),
    _released(dots_ocr, "dots_ocr", "qwen2"),
    *map(_own, own.ARCHITECTURES),
)


def family_of(config: dict[str, Any], name: str) -> Family:
    """The family that a config.json says it is.

    Args:
        config: its content.
        name: what errors call the file.

    Raises:
        ConversionError: it is none of ours.
    """
    said, architectures = config.get("model_type"), config.get("architectures")
    alike = [family for family in FAMILIES if family.model_type == said]
    if not alike:
        known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
        raise ConversionError(f"{name}: model_type is {said!r}; expected one of {known}")
    for family in alike:
        if architectures == [family.architecture]:
            return family
    if architectures is None and len(alike) == 1:
        return alike[0]
    wanted = " or ".join(family.architecture for family in alike)
    raise ConversionError(f"{name}: architectures is {architectures}; expected {wanted}")


def read_model(
    config: dict[str, Any], name: str, pictures: Sequence[Fields] = ()
) -> tuple[Family, ModelConfig]:
    """The family and our configuration of the model that a config.json describes.

    Args:
        config: its content.
        name: what errors call the file.
        pictures: settings of an image processor; those of several files must agree.

    Raises:
        ConversionError: it is of no known family, or has a field that our model does not build.
    """
    family = family_of(config, name)
    fields = Fields(config, name)
    sections = family.read(fields, pictures)
    fields.done()
    try:
        return family, ModelConfig.model_validate({"name": family.model_type, **sections})
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise ConversionError(
            f"{name}: its sizes make no model (model.{where}: {detail['msg']})"
        ) from error


def family_for(model: ModelConfig) -> Family:
    """The family that has every trait of a model.

    Raises:
        ConversionError: none has; it tells what each of them lacks.
    """
    refusals = []
    for family in FAMILIES:
        if family.sees is not (model.vision is not None):
            continue
        try:
            family.write(model)
        except ConversionError as error:
            refusals.append(str(error))
        else:
            return family
    raise ConversionError(f"no Hugging Face family has this model: {'; '.join(refusals)}")
