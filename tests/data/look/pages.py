"""Data of every kind to look at, and a page read back with Python's own HTML parser."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.tokenizer import byte_tokenizer
from tests.data.samples import entry, picture
from tests.data.videos import video

HOSTILE = (
    "</script></style></title><script>document.title='owned'</script>"
    "<img src=http://127.0.0.1:{port}/x onerror=alert(1)><link rel=stylesheet "
    "href=http://127.0.0.1:{port}/y> --> ]]> &lt;&amp;&#60; \"double\" 'single' `back` "
    "\u202e turned \u2066 \u0000\u001b[31m\u0085\u2028 \u0632\u0645\u0627\u0646 \u4e2d\u6587 "
    "\U0001f469\u200d\U0001f467 e\u0301 <|user|><|image|>\r\n\ttab "
)
"""Text that would like to be more than text."""

LONG = "word " * 640


def write_sets(folder: Path, port: int = 9) -> Path:
    """Build `mix` and `docs` with pictures, and `text` with knots, below a folder; write recipes
    `mix.yaml` and `untied.yaml` beside them."""
    hostile = HOSTILE.format(port=port)
    for name, size in {"a": (60, 90), "b": (120, 64), "c": (20, 20)}.items():
        picture(*size).save(folder / f"{name}.png")
    (folder / "v.mp4").write_bytes(video(frames=40, size=(48, 64)))
    boxes = [{"box": [10, 5, 40, 30]}, {"point": [80, 50]}, {"box": [0, 0, 90, 60]}]
    _build(folder, "mix", [
        entry("plain?", "Yes.", id="text"),
        entry("<image>\nWhat?", "Noise.", ["a.png"], id=hostile),
        entry("<image> <image> and <image>?", "All of it.", ["a.png", "b.png", "c.png"], id=3),
        entry("<image> near <point:1>", "It is <box:0>, in <box:2>.", ["a.png"], objects=boxes),
        entry("<video>\nWhat?", "Frames.", videos=["v.mp4"], id="video"),
        entry(hostile, hostile + LONG, id="hostile"),
        {"id": "think", "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "gpt", "value": "<think>\nsum\n</think>\n\n4"}]},
    ])  # fmt: skip
    documents = [{"texts": ["Before.", None, "After."], "images": [None, "b.png", None]}]
    _build(folder, "docs", documents, form="interleaved")
    words = [{"text": f"{number} " * 90} for number in range(12)]
    _build(folder, "text", words, form="text", tokenizer=byte_tokenizer().with_knots())
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe.replace("FOLDER", str(folder)))
    return folder


RECIPES = {
    "mix": """
model: dots-vlm-demo
training: {train_iters: 4, seq_length: 4096, global_batch_size: 2}
data:
  pad_multiple: 16
  shuffle: false
  train:
    mix: {path: FOLDER/mix, max_epochs: 1}
    docs: {path: FOLDER/docs, max_epochs: 1}
""",
    "untied": """
model: dots-vlm-demo
training: {train_iters: 4, seq_length: 512, global_batch_size: 2}
data:
  long_samples: split
  train:
    text:
      path: FOLDER/text
      max_epochs: 1
      untie: {probability: 1.0, backtrace_probability: 0.5}
""",
}


def _build(folder: Path, name: str, entries: list[Any], form: str = "auto", **options: Any) -> None:
    source = folder / f"{name}.jsonl"
    source.write_text("\n".join(json.dumps(item) for item in entries))
    build_dataset(source, folder / name, workers=1, form=form, **options)


@dataclass
class Token:
    """One element among the tokens of a page."""

    tag: str
    kind: str
    tokens: int
    text: str = ""
    image: str | None = None
    marks: list[dict[str, str]] = field(default_factory=list)
    caption: str = ""


@dataclass
class PageLine:
    """A line of tokens, with what its attributes say of it."""

    first: int
    position: int
    ids: list[int]
    tokens: list[Token] = field(default_factory=list)


@dataclass
class PageRow:
    """A row of a page."""

    number: int
    lines: list[PageLine] = field(default_factory=list)
    filler: int = 0
    failures: list[str] = field(default_factory=list)

    def layout(self, length: int, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, learned, positions) of the row as the page tells them; padding has the pad id."""
        ids = np.full(length, pad)
        learned, positions = np.zeros(length, bool), np.full(length, -1)
        seen = np.zeros(length, int)
        for line in self.lines:
            assert len(line.ids) == sum(token.tokens for token in line.tokens)
            at = line.first
            ids[at : at + len(line.ids)] = line.ids
            positions[at : at + len(line.ids)] = line.position + np.arange(len(line.ids))
            for token in line.tokens:
                learned[at : at + token.tokens] = token.tag == "b"
                seen[at : at + token.tokens] += 1
                at += token.tokens
        seen[length - self.filler :] += 1
        assert (seen == 1).all()
        return ids, learned, positions


class Page(HTMLParser):
    """Reads a page."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[PageRow] = []
        self.inline: dict[str, str] = {"script": "", "style": "", "title": ""}
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self._token: Token | None = None
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        attrs = {name: value or "" for name, value in attributes}
        self.tags.append((tag, attrs))
        classes = attrs.get("class", "")
        if tag == "section":
            self.rows.append(PageRow(int(attrs["data-row"])))
        elif classes.startswith("line"):
            ids: list[int] = []
            for word in attrs["data-ids"].split():
                number, _, times = word.partition("*")
                ids += [int(number)] * int(times or 1)
            line = PageLine(int(attrs["data-first"]), int(attrs["data-position"]), ids)
            self.rows[-1].lines.append(line)
        elif (tag, classes) == ("p", "filler"):
            self.rows[-1].filler = int(attrs["data-n"])
        elif self._open and self._open[-1] == ("div", "text"):
            self._token = Token(tag, classes, int(attrs.get("data-n", 1)))
            self.rows[-1].lines[-1].tokens.append(self._token)
        elif self._token is not None and tag == "img":
            self._token.image = attrs["src"]
        elif self._token is not None and self._in("marks") and tag in ("rect", "path"):
            self._token.marks.append(attrs)
        if tag not in ("meta", "img", "input", "br"):
            self._open.append((tag, classes))

    def handle_endtag(self, tag: str) -> None:
        while self._open:
            opened, _ = self._open.pop()
            if opened == tag:
                break
        if not self._in("text"):
            self._token = None

    def handle_data(self, data: str) -> None:
        for tag in self.inline:
            if self._open and self._open[-1][0] == tag and ("svg", "bar") not in self._open:
                self.inline[tag] += data
        self.text += data
        if self._open and self._open[-1][1] == "failure":
            self.rows[-1].failures.append(data)
        if self._token is not None and self._in("cap"):
            self._token.caption += data + "|"
        elif self._token is not None and self._open[-2:-1] == [("div", "text")]:
            self._token.text += data
        elif self._token is not None and self._open[-1][0] == "u":
            self._token.text += {"\u21b5": "", "[nothing]": ""}[data]

    def _in(self, name: str) -> bool:
        return any(name in classes.split() for _, classes in self._open)
