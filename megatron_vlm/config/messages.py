"""What is said about a configuration that does not fit the schema: one line for each mistake."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Location = tuple[int | str, ...]

# pydantic's wording where it would puzzle someone who writes YAML.
_EXPECTED = {
    "string_type": "text (put it in quotes)",
    "bool_type": "true or false",
    "dict_type": "a mapping (`key: value` lines)",
    "list_type": "a list",
    "tuple_type": "a list",
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One source of values: a file or an override."""

    label: str
    """How errors name the source."""
    values: dict[str, Any]
    """What it says, as plain nested mappings."""
    key: tuple[str, ...] = ()
    """The key that an override names; empty for a file."""


def describe(error: ValidationError, schema: type[BaseModel], layers: Sequence[Layer]) -> list[str]:
    """One line for each mistake: the field, its value and source, what was expected.

    `layers` are searched from the last to the first for the source of a value.
    """
    return [_line(detail, schema, layers) for detail in error.errors(include_url=False)]


def known_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections before their fields; NAME for a free name."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        section = _section(field.annotation)
        if section is not None:
            free = ".NAME" if get_origin(field.annotation) is dict else ""
            yield from known_keys(section, f"{prefix}{name}{free}.")


def named_mappings(schema: type[BaseModel], prefix: Location = ()) -> Iterator[Location]:
    """Every field that is a mapping of free names, unlike a section, whose keys are fixed."""
    for name, field in schema.model_fields.items():
        if get_origin(field.annotation) is dict:
            yield (*prefix, name)
            continue
        section = _section(field.annotation)
        if section is not None:
            yield from named_mappings(section, (*prefix, name))


def nearest_keys(key: str, schema: type[BaseModel], most: int = 3) -> list[str]:
    """The known keys that resemble `key`, best first.

    A key of the same name in another section comes first, then keys spelled alike; failing both,
    keys whose docstring speaks of it (`learning_rate` finds `optimizer.lr`).
    """
    keys = [known for known in known_keys(schema) if not key.startswith(f"{known}.")]
    last = _name(key)
    alike = difflib.get_close_matches(key, keys, n=most, cutoff=0.75)
    names = difflib.get_close_matches(last, sorted(set(map(_name, keys))), n=most, cutoff=0.75)
    by_name = [known for name in names for known in keys if _name(known) == name]
    near = [*(known for known in by_name if _name(known) == last), *alike, *by_name]
    if not near:
        words = last.replace("_", " ").lower()
        steps = {known: tuple(known.split(".")) for known in keys}
        near = [known for known in keys if words in _meaning(steps[known], schema).lower()]
    return list(dict.fromkeys(near))[:most]


def _line(detail: ErrorDetails, schema: type[BaseModel], layers: Sequence[Layer]) -> str:
    location, kind = detail["loc"], detail["type"]
    key = _dotted(location)
    source = _source(location, layers)
    if kind == "extra_forbidden":
        near = nearest_keys(key, schema)
        if near:
            hint = f"did you mean {' or '.join(_named(known, location) for known in near)}?"
        else:
            section = _section_at(location[:-1], schema)
            hint = f"known here: {', '.join(section.model_fields)}" if section else "remove it"
        return f"unknown key {key} (value {_show(detail['input'])}{source}); {hint}"
    if kind == "missing":
        meaning = _meaning(location, schema)
        return f"{key} is required{meaning}; set it in the recipe or as {key}=VALUE"
    if kind == "value_error":
        reason = str(detail.get("ctx", {}).get("error", detail["msg"]))
        return f"{key}: {reason}" if key else reason
    return f"{key} is {_show(detail['input'])}{source}; expected {_expected(detail, schema)}"


def _expected(detail: ErrorDetails, schema: type[BaseModel]) -> str:
    kind, location = detail["type"], detail["loc"]
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in ("model_type", "model_attributes_type"):
        section = _section_at(location, schema)
        fields = ", ".join(section.model_fields) if section else ""
        return f"a mapping with the keys {fields}"
    said = detail["msg"].removeprefix("Input should be ")
    if kind.startswith(("greater_than", "less_than")):
        return f"a number {said}"
    if kind == "literal_error":
        choices = [part.strip("'") for part in said.replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(detail["input"]), choices, n=1)
        return f"{said}; did you mean {near[0]!r}?" if near else said
    return said


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section a field holds, also behind `| None`, by name or in a list."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _section_at(location: Location, schema: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = schema
    free = False
    for step in location:
        if free:  # a name that the recipe chose
            free = False
            continue
        field = section.model_fields.get(str(step)) if section else None
        section = _section(field.annotation) if field else None
        free = field is not None and get_origin(field.annotation) in (dict, tuple)
    return section


def _meaning(location: Location, schema: type[BaseModel]) -> str:
    """The field's own docstring in brackets, or nothing."""
    section = _section_at(location[:-1], schema)
    field = section.model_fields.get(str(location[-1])) if section else None
    if field is None or not field.description:
        return ""
    return f" ({' '.join(field.description.split()).rstrip('.')})"


def _source(location: Location, layers: Sequence[Layer]) -> str:
    for layer in reversed(layers):
        if _holds(layer.values, location):
            return f", from {layer.label}"
    return ""


def _holds(values: Any, location: Location) -> bool:
    for step in location:
        if isinstance(step, int):
            # A list belongs to one layer as a whole.
            return isinstance(values, list)
        if not isinstance(values, dict) or step not in values:
            return False
        values = values[step]
    return True


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _named(known: str, location: Location) -> str:
    """A known key with the names that the recipe chose, as far as it goes the same way."""
    steps = known.split(".")
    for place, (step, given) in enumerate(zip(steps, location, strict=False)):
        if step == "NAME":
            steps[place] = str(given)
        elif step != given:
            break
    return ".".join(steps)


def _dotted(location: Location) -> str:
    key = ""
    for step in location:
        key += f"[{step}]" if isinstance(step, int) else f".{step}" if key else step
    return key


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
