"""How a family's tensors lie inside ours: a table of names, read in both directions.

A row tells which of their tensors make up one of ours, and in what form: the same elements,
matrices stacked on each other, queries, keys and values group by group, or experts. Whatever the
form, a tensor of theirs is cut into runs of elements that follow each other in both, so reading,
writing and the proof that nothing is lost need only know runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_vlm.config.model_schema import ModelConfig
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf.tensors import Shape, model_tensors


class Run(NamedTuple):
    """Elements that follow each other both in a tensor of ours and in one of theirs."""

    ours: str
    theirs: str
    our_start: int
    """First of them in ours, flattened."""
    their_start: int
    """First of them in theirs, flattened."""
    size: int
    """How many they are."""


class Place(NamedTuple):
    """One of their tensors inside one of ours."""

    name: str
    shape: Shape
    runs: Sequence[tuple[int, int, int]]
    """(start in ours, start in theirs, size), all in elements."""


Form = Callable[[Shape, tuple[str, ...], ModelConfig], Iterator[Place]]
"""From our shape and their names to where each of theirs lies."""


@dataclass(frozen=True)
class Row:
    """One row of a family's table.

    `{layer}` is a layer's number, in both names; `{mtp}` that of a multi-token-prediction layer in
    ours, which is layer `{after}` in theirs: they come after the decoder's. `{expert}` stands for
    every expert.
    """

    ours: str
    form: Form
    theirs: tuple[str, ...]

    def match(self, key: str, model: ModelConfig) -> tuple[str, ...] | None:
        """Their names for our tensor `key`; nothing if the row is about another."""
        pattern = re.escape(self.ours).replace(r"\{layer\}", r"(?P<layer>\d+)")
        found = re.fullmatch(pattern.replace(r"\{mtp\}", r"(?P<mtp>\d+)"), key)
        if found is None:
            return None
        numbers = {name: int(text) for name, text in found.groupdict().items()}
        if "mtp" in numbers:
            numbers["after"] = model.language.num_layers + numbers["mtp"]
        return tuple(_fill(name, numbers) for name in self.theirs)


@dataclass(frozen=True)
class Copy:
    """A tensor of theirs that repeats another, byte for byte."""

    name: str
    of: str
    written: bool
    """Whether a release has it; it may always be absent from what is read."""
    applies: Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class NameMap:
    """A family's whole table."""

    rows: tuple[Row, ...]
    copies: tuple[Copy, ...] = ()


@dataclass
class Translation:
    """All tensors of a model on both sides, and the runs that they share."""

    ours: dict[str, Shape]
    theirs: dict[str, Shape]
    runs: list[Run]
    copies: list[Copy] = field(default_factory=list)

    def by_ours(self) -> dict[str, list[Run]]:
        """The runs of each of our tensors, in its order."""
        grouped: dict[str, list[Run]] = {name: [] for name in self.ours}
        for run in self.runs:
            grouped[run.ours].append(run)
        for runs in grouped.values():
            runs.sort(key=lambda run: run.our_start)
        return grouped

    def by_theirs(self) -> dict[str, list[Run]]:
        """The runs of each of their tensors, in its order."""
        grouped: dict[str, list[Run]] = {name: [] for name in self.theirs}
        for run in self.runs:
            grouped[run.theirs].append(run)
        for runs in grouped.values():
            runs.sort(key=lambda run: run.their_start)
        return grouped


def translate(model: ModelConfig, names: NameMap) -> Translation:
    """Where every element of a model lies on the other side.

    Raises:
        ConversionError: the table has no place for a tensor of the model, or does not account for
            every element of both sides exactly once.
    """
    ours = model_tensors(model)
    theirs: dict[str, Shape] = {}
    runs: list[Run] = []
    for key, shape in ours.items():
        row, their_names = _row_of(key, names, model)
        for place in row.form(shape, their_names, model):
            if place.name in theirs:
                raise ConversionError(f"{place.name} would hold {key} and another tensor too")
            theirs[place.name] = place.shape
            runs += [Run(key, place.name, a, b, size) for a, b, size in place.runs]
    found = Translation(ours, theirs, runs)
    _prove(ours, found.by_ours(), lambda run: run.our_start)
    _prove(theirs, found.by_theirs(), lambda run: run.their_start)
    for copy in names.copies:
        if copy.applies(model):
            numbers = {"after": model.language.num_layers}
            name, of = _fill(copy.name, numbers), _fill(copy.of, numbers)
            found.copies.append(Copy(name, of, copy.written, copy.applies))
    return found


def layers(*rows: Row) -> tuple[Row, ...]:
    """Rows of a decoder layer, named from its own start: for `decoder`'s and for prediction's."""
    prefixes = (
        ("language.decoder.layers.{layer}.", "model.layers.{layer}."),
        ("language.mtp.layers.{mtp}.transformer_layer.", "model.layers.{after}."),
    )
    return tuple(
        Row(ours + row.ours, row.form, tuple(theirs + name for name in row.theirs))
        for ours, theirs in prefixes
        for row in rows
    )


def same(shape: Shape, names: tuple[str, ...], _: ModelConfig) -> Iterator[Place]:
    """The same tensor under another name."""
    (name,) = names
    yield Place(name, shape, [(0, 0, math.prod(shape))])


def convolution(shape: Shape, names: tuple[str, ...], model: ModelConfig) -> Iterator[Place]:
    """Ours is the matrix `[hidden, channels * patch**2]`, theirs the kernel it flattens."""
    (name,) = names
    assert model.vision is not None
    kernel = (shape[0], model.vision.in_channels, *[model.vision.patch_size] * 2)
    yield Place(name, kernel, [(0, 0, math.prod(shape))])


def stacked(shape: Shape, names: tuple[str, ...], _: ModelConfig) -> Iterator[Place]:
    """Matrices of equal height on top of each other: gate, then up."""
    part = (shape[0] // len(names), *shape[1:])
    size = math.prod(part)
    for number, name in enumerate(names):
        yield Place(name, part, [(number * size, 0, size)])


def grouped(shape: Shape, names: tuple[str, ...], model: ModelConfig) -> Iterator[Place]:
    """Rows lie group by group: the group's queries, its key, its value."""
    language = model.language
    groups, width = language.query_groups, math.prod(shape[1:])
    heads = (language.num_attention_heads // groups, 1, 1)
    offset = 0
    for name, count in zip(names, heads, strict=True):
        size = count * language.head_dim * width
        stride = sum(heads) * language.head_dim * width
        runs = [(group * stride + offset, group * size, size) for group in range(groups)]
        yield Place(name, (groups * count * language.head_dim, *shape[1:]), runs)
        offset += size


def experts(shape: Shape, names: tuple[str, ...], _: ModelConfig) -> Iterator[Place]:
    """Ours holds all experts of a layer, and gate and up of each beside each other."""
    matrix = shape[-2:]
    size = math.prod(matrix)
    for expert in range(shape[0]):
        for number, name in enumerate(names):
            start = (expert * len(names) + number) * size
            yield Place(name.replace("{expert}", str(expert)), matrix, [(start, 0, size)])


def _fill(name: str, numbers: dict[str, int]) -> str:
    for field_name, number in numbers.items():
        name = name.replace(f"{{{field_name}}}", str(number))
    return name


def _row_of(key: str, names: NameMap, model: ModelConfig) -> tuple[Row, tuple[str, ...]]:
    for row in names.rows:
        their_names = row.match(key, model)
        if their_names is not None:
            return row, their_names
    raise ConversionError(
        f"{key} has no name in this Hugging Face family; the model has a trait that it lacks"
    )


def _prove(
    shapes: dict[str, Shape], runs: dict[str, list[Run]], start: Callable[[Run], int]
) -> None:
    """That runs, in order, cover each tensor from its first to its last element, each once."""
    for name, shape in shapes.items():
        place = 0
        for run in runs[name]:
            if start(run) != place:
                raise ConversionError(f"{name}: element {place} has no or several counterparts")
            place += run.size
        if place != math.prod(shape):
            raise ConversionError(f"{name}: only {place} of {math.prod(shape)} elements are mapped")
