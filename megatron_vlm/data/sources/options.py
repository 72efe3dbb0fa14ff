"""What a user may say about how a source is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_vlm.data.chat import ThinkingSettings
from megatron_vlm.data.pdf.settings import PdfMode, PdfSettings

if TYPE_CHECKING:
    from megatron_vlm.data.chat_template import ChatTemplate
    from megatron_vlm.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Settings of all forms; each form takes what concerns it."""

    image_root: Path | None = None
    """Folder that paths of pictures and videos start from and stay in; null: that of the source."""
    split: str = "train"
    """Part of an Energon folder, as its `split.yaml` names it."""
    text_field: str = "text"
    """Field of JSON lines of text that holds the document."""
    text_unit: Literal["file", "line", "paragraph"] = "file"
    """What is one document in a `.txt` file: all of it, each line, or what blank lines part."""
    fps: float | None = None
    """Frames a second taken from videos whose entry names none; null: the build's default."""
    thinking: ThinkingSettings = field(default_factory=ThinkingSettings)
    """What becomes of thinking traces."""
    learn_thoughts: bool = False
    """Learn the thoughts of a trajectory too, not its actions alone."""
    pdf_mode: PdfMode = "interleaved"
    """What becomes of PDF files: documents of their text and pictures, or pages with covered text
    to read."""
    pdf: PdfSettings = field(default_factory=PdfSettings)
    """How PDF files are read."""
    tokenizer: Tokenizer | None = None
    """The set's tokenizer, which Megatron token files are checked against."""
    template: ChatTemplate | None = None
    """What dialogues are written by, for that tokenizer; null: the built-in format."""
    end_of_document: int | None = None
    """Id that ends documents in Megatron token files; it gives way to the set's own `<|eos|>`.
    Null: that is the id they end with, if any."""
