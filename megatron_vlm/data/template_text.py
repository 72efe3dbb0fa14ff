"""A chat template as it is published, kept and passed on: its text and the tokens that it names.

What is read from a model's folder is written again as one `chat_template.json`, in a data set and
in every checkpoint of a run, so that generation and releases need nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.data.format import TEMPLATE_FILE
from megatron_vlm.data.template_sandbox import MAX_SOURCE
from megatron_vlm.data.tokenizer import sha256
from megatron_vlm.errors import DataError

_JINJA_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_TOKENS_FILE = "special_tokens_map.json"
_FIELD = "chat_template"
_MAX_CONFIG = 2**26

_TOKEN_NAME = re.compile(r"\b(?:bos|eos|unk|sep|pad|cls|mask)_token\b")


@dataclass(frozen=True, slots=True)
class TemplateText:
    """A chat template apart from any tokenizer."""

    source: str
    """In Jinja."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Spellings of what the source writes by name: `bos_token`, `eos_token`, ..."""
    name: str = field(default="chat template", compare=False)
    """What errors call it."""

    @classmethod
    def load(cls, path: Path) -> TemplateText:
        """Read a template as models are published with.

        Args:
            path: a model's folder, a JSON file with the field `chat_template`, or a file of the
                template alone. A folder's `chat_template.jinja` comes before its
                `tokenizer_config.json`, and this before its `chat_template.json`. Special tokens
                are those of the JSON file itself, else of the `tokenizer_config.json` and
                `special_tokens_map.json` beside it.

        Raises:
            DataError: no template there, or one that names a special token that nothing spells.
        """
        file = _file_in(path) if path.is_dir() else path
        if file is None:
            raise DataError(
                f"{path}: has no {_JINJA_FILE}, no {TEMPLATE_FILE}, and no {_CONFIG_FILE} with a "
                f"{_FIELD}; name a file or a folder that holds a chat template"
            )
        if file.suffix == ".json":
            config = _read_config(file)
            source = _template_of(config.get(_FIELD))
            if source is None:
                raise DataError(f"{file}: has no {_FIELD}; name a file that holds one")
        else:
            config, source = {}, _read(file, 4 * MAX_SOURCE)
        beside = [
            file.with_name(name)
            for name in (_TOKENS_FILE, _CONFIG_FILE)
            if file.with_name(name).exists()
        ]
        spelled: dict[str, str] = {}
        for other in beside:
            spelled |= _special_tokens(_read_config(other))
        spelled |= _special_tokens(config)
        named = sorted(set(_TOKEN_NAME.findall(source)))
        if not beside and not config and named:
            raise DataError(
                f"{file}: writes {', '.join(named)}, and there is no {_CONFIG_FILE} beside it that "
                "spells them; copy the model's there, or name the model's folder"
            )
        return cls(source, {key: spelled[key] for key in named if key in spelled}, str(path))

    @classmethod
    def of_model(cls, folder: Path) -> TemplateText | None:
        """The template of a model's folder, if it has one.

        Raises:
            DataError: as `load` does.
        """
        return None if _file_in(folder) is None else cls.load(folder)

    @classmethod
    def from_json(cls, text: str, name: str) -> TemplateText:
        """From what `to_json` wrote; `name` is what errors call it.

        Raises:
            DataError: it is something else.
        """
        config = _parse_config(text, name)
        source = _template_of(config.get(_FIELD))
        if source is None:
            raise DataError(f"{name}: has no {_FIELD}; restore the file")
        return cls(source, _special_tokens(config), name)

    def to_json(self) -> str:
        """The text of `chat_template.json`, which `load` reads too."""
        fields = {_FIELD: self.source, **dict(sorted(self.special_tokens.items()))}
        return json.dumps(fields, ensure_ascii=False, indent=2) + "\n"

    @property
    def sha256(self) -> str:
        """SHA-256 of `to_json`: templates that agree here write alike with one tokenizer."""
        return sha256(self.to_json().encode())


def _file_in(folder: Path) -> Path | None:
    """The file of a folder that holds its template."""
    alone, config, kept = (folder / name for name in (_JINJA_FILE, _CONFIG_FILE, TEMPLATE_FILE))
    if alone.exists():
        return alone
    if config.exists() and _read_config(config).get(_FIELD) is not None:
        return config
    return kept if kept.exists() else None


def _read(path: Path, most: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a chat template"
        ) from error
    if len(content) > most:
        raise DataError(f"{path}: more than {most} bytes; expected a chat template")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; expected a chat template") from error


def _read_config(path: Path) -> dict[str, Any]:
    return _parse_config(_read(path, _MAX_CONFIG), str(path))


def _parse_config(text: str, name: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not valid JSON ({error}); mend the file") from error
    if not isinstance(config, dict):
        raise DataError(f"{name}: holds {type(config).__name__}; expected an object")
    return config


def _template_of(field: Any) -> str | None:
    """The template of a `chat_template` field: a string, or a list with one called default."""
    if isinstance(field, list):
        named = [t for t in field if isinstance(t, dict) and t.get("name") == "default"]
        field = named[0].get("template") if named else None
    return field if isinstance(field, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, which are spelled out or described."""
    found = {}
    for key, value in config.items():
        spelled = value.get("content") if isinstance(value, dict) else value
        if _TOKEN_NAME.fullmatch(key) and isinstance(spelled, str):
            found[key] = spelled
    return found
