"""Folders that Megatron-Energon has prepared: tars, and in `.nv-meta/` what their members mean.

Only the declarations are read. Code that a folder brings along (a sample loader) is never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from megatron_vlm.data.chat import Turn
from megatron_vlm.data.draft import Draft, SampleKind
from megatron_vlm.data.sources.byte_ranges import shortened
from megatron_vlm.data.sources.conversations import Content
from megatron_vlm.data.sources.documents import Shown, document_draft
from megatron_vlm.data.sources.media import MediumKind, entry_json
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.tar_groups import Group, TarGroupSource, extensions_of
from megatron_vlm.data.sources.webdataset import expand_braces, medium_kind
from megatron_vlm.errors import DataError

META_FOLDER = ".nv-meta"
"""Folder that makes a folder an Energon data set."""

_MAX_META_BYTES = 4 * 2**20
"""A declaration is some kilobytes; YAML of a megabyte takes seconds to read."""
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
_JSON_EXTENSIONS = ("json", "jsn")

FieldPath = tuple[str, ...]
"""An extension, then keys and indices into its JSON."""


@dataclass(frozen=True, slots=True)
class _Fields:
    """A group's members as the fields of a sample."""

    group: Group
    paths: dict[str, list[FieldPath]]

    def value(self, name: str) -> Any:
        """The value of a field; null if the map has none. Raises DataError if the group has none.

        Of several places the first that is there is taken.
        """
        fault = DataError(f"field_map has no {name}")
        for path in self.paths.get(name, []):
            try:
                return self._follow(path)
            except DataError as error:
                fault = error
        if name in self.paths:
            raise fault
        return None

    def text(self, name: str) -> str:
        """A field that is a text."""
        value = self.value(name)
        if not isinstance(value, str):
            raise DataError(f"{name}: is {type(value).__name__}; expected a text")
        return value

    def shown(self, name: MediumKind) -> Shown:
        """A field that is a picture or a video."""
        for path in self.paths[name]:
            if path[0] in self.group.members:
                if medium_kind(path[0]) != name or len(path) > 1:
                    raise DataError(f"{name}: {path[0]!r} is no extension of a {name}")
                return Shown(name, self.group.medium(path[0]))
        wanted = " or ".join(path[0] for path in self.paths[name])
        raise DataError(f"{name}: no member .{wanted}; the sample has {extensions_of(self.group)}")

    def kept(self) -> bytes:
        """What is kept beside the sample: its fields but for the media."""
        names = (name for name in self.paths if name not in ("image", "video"))
        return entry_json({name: self.value(name) for name in names})

    def _follow(self, path: FieldPath) -> Any:
        extension, *rest = path
        if extension not in self.group.members:
            raise DataError(f"no member .{extension}; the sample has {extensions_of(self.group)}")
        if extension.rpartition(".")[2] not in _JSON_EXTENSIONS:
            return self.group.text(extension)
        value: Any = self.group.json(extension)
        for done, step in enumerate(rest):
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                at = "".join(f"[{key}]" for key in rest[: done + 1])
                raise DataError(f"{extension}{at}: there is none") from error
        return value


def open_energon(path: Path, options: SourceOptions) -> TarGroupSource:
    """The samples of a part (`options.split`) of an Energon folder.

    Args:
        path: folder that holds `.nv-meta`.
        options: `split`, `fps`, `thinking`, `template`.

    Raises:
        DataError: no such folder or part, a tar is missing, or a sample type that needs code or is
            not read.
    """
    meta = path / META_FOLDER
    if not meta.is_dir():
        raise DataError(f"{path}: holds no {META_FOLDER}; prepare it with `energon prepare`")
    config = _read(meta, "dataset")
    name = _sample_type(meta, config)
    kind, to_draft, needed = _SAMPLE_TYPES[name]
    paths = _field_map(meta, config)
    missing = next((field for field in needed if field not in paths), None)
    if missing is not None:
        raise DataError(f"{meta / 'dataset.yaml'}: field_map has no {missing}; a {name} needs it")
    shards, excluded = _split(path, options.split)
    return TarGroupSource(
        kind,
        [path / shard for shard in shards],
        shards,
        partial(_drafts, to_draft, paths, options),
        excluded,
    )


def _drafts(
    to_draft: Callable[[_Fields, SourceOptions], Draft],
    paths: dict[str, list[FieldPath]],
    options: SourceOptions,
    group: Group,
) -> Sequence[Draft]:
    return [to_draft(_Fields(group, paths), options)]


def _captioning(fields: _Fields, options: SourceOptions) -> Draft:
    caption = fields.text("caption").strip()
    return document_draft([fields.shown("image"), caption], fields.kept())


def _ocr(fields: _Fields, options: SourceOptions) -> Draft:
    return document_draft([fields.shown("image"), fields.text("text")], fields.kept())


def _text(fields: _Fields, options: SourceOptions) -> Draft:
    return document_draft([fields.text("text")], fields.kept())


def _vqa(fields: _Fields, options: SourceOptions) -> Draft:
    return _question(fields, options, "image", fields.text("context"), _best_answer(fields))


def _video_qa(fields: _Fields, options: SourceOptions) -> Draft:
    return _question(fields, options, "video", fields.text("context"), _best_answer(fields))


def _multiple_choice(fields: _Fields, options: SourceOptions) -> Draft:
    """The choices stand below the question, lettered; the answer is a letter. Our choice."""
    choices = fields.value("choices")
    if not _is_texts(choices) or len(choices) > 26:
        raise DataError("choices: expected a list of 1 to 26 texts")
    right = fields.value("correct_choice_idx")
    right = 0 if right is None else right
    if isinstance(right, str) and right.strip().isdecimal() and len(right) < 9:
        right = int(right)
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise DataError(f"correct_choice_idx: expected 0 to {len(choices) - 1}")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False)]
    question = "\n".join([fields.text("context"), *lines])
    return _question(fields, options, "image", question, letters[right])


def _question(
    fields: _Fields, options: SourceOptions, kind: MediumKind, question: str, answer: str
) -> Draft:
    content = Content(lambda named, _: named)
    content.listed[kind].append(fields.shown(kind).medium)
    turns = [
        Turn("user", content.text(question, "context")),
        Turn("assistant", content.text(answer, "answers")),
    ]
    return content.draft([turns], options, fields.kept())


def _best_answer(fields: _Fields) -> str:
    """The answer with the greatest weight; of equals, and without weights, the first."""
    answers, weights = fields.value("answers"), fields.value("answer_weights")
    if isinstance(answers, str):
        return answers
    if not _is_texts(answers):
        raise DataError("answers: expected a list of at least one text")
    if weights is None:
        return str(answers[0])
    if (
        not isinstance(weights, list)
        or len(weights) != len(answers)
        or not all(isinstance(w, int | float) for w in weights)
    ):
        raise DataError(f"answer_weights: expected {len(answers)} numbers, as many as answers")
    return str(answers[max(range(len(answers)), key=weights.__getitem__)])


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


_SAMPLE_TYPES: dict[
    str, tuple[SampleKind, Callable[[_Fields, SourceOptions], Draft], tuple[str, ...]]
] = {
    "CaptioningSample": ("document", _captioning, ("image", "caption")),
    "OCRSample": ("document", _ocr, ("image", "text")),
    "TextSample": ("document", _text, ("text",)),
    "VQASample": ("conversation", _vqa, ("image", "context", "answers")),
    "VQAOCRSample": ("conversation", _vqa, ("image", "context", "answers")),
    "VidQASample": ("conversation", _video_qa, ("video", "context", "answers")),
    "MultiChoiceVQASample": ("conversation", _multiple_choice, ("image", "context", "choices")),
}
"""Kind, maker and needed fields of each sample type that its fields alone describe."""


def _sample_type(meta: Path, config: dict[str, Any]) -> str:
    place = meta / "dataset.yaml"
    given = config.get("sample_type")
    declared = given if isinstance(given, dict) else config
    name, module = declared.get("__class__"), declared.get("__module__")
    if not isinstance(name, str):
        raise DataError(f"{place}: names no __class__; expected one of {', '.join(_SAMPLE_TYPES)}")
    if name.startswith("Crude"):
        raise DataError(
            f"{place}: {shortened(name)} leaves it to code what a sample is; read the tars as "
            "--form webdataset"
        )
    name = re.sub("Webdataset$", "Sample", name)
    of_energon = isinstance(module, str) and module.split(".")[:2] == ["megatron", "energon"]
    if name not in _SAMPLE_TYPES or not of_energon:
        raise DataError(
            f"{place}: {shortened(name)} of {shortened(module)}; expected one of "
            f"{', '.join(_SAMPLE_TYPES)} of megatron.energon"
        )
    return name


def _field_map(meta: Path, config: dict[str, Any]) -> dict[str, list[FieldPath]]:
    place = meta / "dataset.yaml"
    given = config.get("field_map")
    if given is None and config.get("sample_loader") is not None:
        raise DataError(
            f"{place}: sample_loader is code, which is not run; declare a field_map instead"
        )
    if not isinstance(given, dict) or not given:
        raise DataError(f"{place}: expected a field_map of sample fields to members")
    paths: dict[str, list[FieldPath]] = {}
    for name, places in given.items():
        if not isinstance(places, str):
            raise DataError(f"{place}: field_map.{name}: expected a text such as json[caption]")
        paths[str(name)] = [_field_path(place, name, one) for one in places.split(",")]
    return paths


def _field_path(place: Path, name: str, given: str) -> FieldPath:
    match = _FIELD.fullmatch(given.strip())
    if match is None:
        raise DataError(
            f"{place}: field_map.{name}: {given[:80]!r}; expected jpg or json[caption][0]"
        )
    return (match[1].lower(), *re.findall(r"\[([^\[\]]+)\]", match[2]))


def _split(path: Path, part: str) -> tuple[list[str], frozenset[str]]:
    """The tars of a part, and the groups in them that are left out as `NAME/KEY`."""
    meta = path / META_FOLDER
    splits = _read(meta, "split")
    place = meta / "split.yaml"
    parts = splits.get("split_parts")
    if not isinstance(parts, dict) or not parts:
        raise DataError(f"{place}: expected split_parts with the tars of each part")
    if part not in parts:
        known = ", ".join(map(repr, parts))
        raise DataError(f"{place}: has no part {part!r}; --split takes one of {known[:200]}")
    excluded = _names(place, "exclude", splits.get("exclude") or [])
    shards = [n for n in _names(place, f"split_parts.{part}", parts[part]) if n not in excluded]
    if not shards:
        raise DataError(f"{place}: part {part!r} has no tars")
    for shard in shards:
        if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise DataError(f"{place}: {shard!r} lies outside the folder")
        if not (path / shard).is_file():
            raise DataError(f"{path / shard}: no such file, though {place} names it")
    return shards, frozenset(excluded)


def _names(place: Path, field: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{place}: {field}: expected a list of names")
    return [name for pattern in value for name in expand_braces(pattern)]


def _read(meta: Path, name: str) -> dict[str, Any]:
    """`NAME.yaml` of the folder, or `NAME.json`, which is YAML too."""
    path = next((p for p in (meta / f"{name}.yaml", meta / f"{name}.json") if p.is_file()), None)
    if path is None:
        raise DataError(f"{meta / name}.yaml: no such file; prepare the folder again")
    try:
        if path.stat().st_size > _MAX_META_BYTES:
            raise DataError(f"{path}: more than {_MAX_META_BYTES} bytes; it is no declaration")
        value = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise DataError(f"{path}: no valid YAML ({line[:200]})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a mapping")
    return value
