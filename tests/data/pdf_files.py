"""A small writer of PDF files, for tests: text in the standard fonts, pictures and forms."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WORDS = (
    "river mountain quiet window harbour seldom bright copper lantern meadow orchard travel "
    "whisper timber gentle marble evening silver thunder pocket market ribbon cellar garden "
    "winter letter summer bridge castle forest island kettle ladder mirror needle oyster pepper "
    "rocket saddle tunnel velvet walnut yellow zigzag anchor basket candle dragon engine falcon"
).split()


@functools.cache
def font_widths(font: str) -> dict[str, float]:
    """Advance of each ASCII character, in font sizes, from Adobe's own metrics."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "pdfcorefonts", f"{font}.afm")
    widths = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("C "):
            code, width = int(line.split()[1]), float(line.split()[4])
            if 32 <= code < 127:
                widths[chr(code)] = width / 1000
    return widths


def text_width(text: str, font: str, size: float) -> float:
    widths = font_widths(font)
    return size * sum(widths[char] for char in text)


def wrap(text: str, font: str, size: float, width: float) -> list[str]:
    """Lines as a typesetter breaks them: each takes what fits."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, font, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def prose(seed: int, words: int) -> str:
    """Made-up sentences, the same for the same seed."""
    rng = np.random.default_rng(seed)
    text = " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=words))
    return text[0].upper() + text[1:] + "."


@dataclass
class Page:
    """One page; coordinates are the PDF's, y upwards from the lower left corner."""

    width: float = 400
    height: float = 500
    rotate: int = 0
    crop: Sequence[float] | None = None
    content: list[str] = field(default_factory=list)
    fonts: dict[str, str] = field(default_factory=dict)
    images: list[bytes] = field(default_factory=list)
    """Whole objects, from `image_object` or `jpeg_object`."""
    masks: dict[int, bytes] = field(default_factory=dict)
    """Soft masks of the images, by their number."""
    form: bool = False
    """Whether the content is inside a form object."""

    def text(
        self,
        x: float,
        y: float,
        text: str,
        font: str = "Courier",
        size: float = 10,
        mode: int = 0,
        matrix: str = "1 0 0 1",
        color: str = "0 g",
    ) -> None:
        name = self.fonts.setdefault(font, f"F{len(self.fonts)}")
        escaped = "".join("\\" + c if c in "()\\" else c for c in text)
        self.content.append(
            f"BT {color} {mode} Tr /{name} {size} Tf {matrix} {x:.3f} {y:.3f} Tm ({escaped}) Tj ET"
        )

    def paragraph(
        self,
        x: float,
        y: float,
        text: str,
        width: float = 300,
        font: str = "Courier",
        size: float = 10,
        leading: float = 1.2,
        indent: float = 0,
        **style: str,
    ) -> float:
        """Write a paragraph; returns the baseline of what would be its next line."""
        lines = wrap(text, font, size, width - indent)
        for number, line in enumerate(lines):
            self.text(x + (0 if number else indent), y, line, font, size, **style)  # type: ignore[arg-type]
            y -= leading * size
        return y

    def image(self, item: bytes, matrix: str, mask: bytes | None = None) -> None:
        if mask is not None:
            self.masks[len(self.images)] = mask
        self.content.append(f"q {matrix} cm /I{len(self.images)} Do Q")
        self.images.append(item)


def image_object(pixels: NDArray[np.uint8], extra: str = "") -> bytes:
    """A picture without loss: [h, w] gray or [h, w, 3]."""
    space = "DeviceGray" if pixels.ndim == 2 else "DeviceRGB"
    return _image(zlib.compress(pixels.tobytes()), pixels.shape, space, "FlateDecode", extra)


def jpeg_object(
    data: bytes, shape: Sequence[int], space: str = "DeviceRGB", extra: str = ""
) -> bytes:
    return _image(data, shape, space, "DCTDecode", extra)


def _image(data: bytes, shape: Sequence[int], space: str, filter_: str, extra: str) -> bytes:
    head = (
        f"<</Type/XObject/Subtype/Image/Width {shape[1]}/Height {shape[0]}/ColorSpace/{space}"
        f"/BitsPerComponent 8/Filter/{filter_}{extra}/Length {len(data)}>>"
    )
    return head.encode() + b"stream\n" + data + b"\nendstream"


def stream(content: bytes, extra: str = "") -> bytes:
    return f"<<{extra}/Length {len(content)}>>stream\n".encode() + content + b"\nendstream"


def pdf(*pages: Page, font_extra: str = "/Encoding/WinAnsiEncoding") -> bytes:
    """The whole file."""
    objects: list[bytes] = [b"<</Type/Catalog/Pages 2 0 R>>", b""]

    def add(item: bytes) -> int:
        objects.append(item)
        return len(objects)

    fonts = {
        name: add(f"<</Type/Font/Subtype/Type1/BaseFont/{name}{font_extra}>>".encode())
        for name in sorted({font for page in pages for font in page.fonts})
    }
    kids = []
    for page in pages:
        images = []
        for number, item in enumerate(page.images):
            if number in page.masks:
                mask = add(page.masks[number])
                item = item.replace(b"/Length", f"/SMask {mask} 0 R/Length".encode(), 1)
            images.append(add(item))
        resources = (
            "/Resources<</Font<<"
            + "".join(f"/{short} {fonts[name]} 0 R" for name, short in page.fonts.items())
            + ">>/XObject<<"
            + "".join(f"/I{number} {item} 0 R" for number, item in enumerate(images))
        )
        content = "\n".join(page.content).encode("cp1252")
        if page.form:
            box = f"/Type/XObject/Subtype/Form/BBox[0 0 {page.width} {page.height}]"
            form = add(stream(content, f"{box}{resources}>>>>"))
            resources += f"/X {form} 0 R"
            content = b"q 1 0 0 1 0 0 cm /X Do Q"
        crop = "" if page.crop is None else f"/CropBox[{' '.join(map(str, page.crop))}]"
        contents = add(stream(content))
        kid = (
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {page.width} {page.height}]{crop}"
            f"/Rotate {page.rotate}{resources}>>>>/Contents {contents} 0 R>>"
        )
        kids.append(add(kid.encode()))
    listed = " ".join(f"{kid} 0 R" for kid in kids)
    objects[1] = f"<</Type/Pages/Kids[{listed}]/Count {len(kids)}>>".encode()
    return assemble(objects)


def assemble(objects: Sequence[bytes], trailer: str = "") -> bytes:
    """A file of these objects, the first of which is the catalogue."""
    file = bytearray(b"%PDF-1.7\n")
    offsets = []
    for number, item in enumerate(objects, start=1):
        offsets.append(len(file))
        file += f"{number} 0 obj\n".encode() + item + b"\nendobj\n"
    start = len(file)
    file += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    file += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    file += f"trailer<</Size {len(objects) + 1}/Root 1 0 R{trailer}>>\n".encode()
    return bytes(file + f"startxref\n{start}\n%%EOF\n".encode())


_PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")


def encrypted_pdf(text: str, user_password: bytes) -> bytes:
    """One page, encrypted by the standard handler of PDF 1.1 (40 bits)."""
    owner_key = hashlib.md5((b"owner" + _PADDING)[:32]).digest()[:5]
    owner = _rc4(owner_key, (user_password + _PADDING)[:32])
    identity, permissions = b"0123456789abcdef", -4
    key = hashlib.md5(
        (user_password + _PADDING)[:32]
        + owner
        + permissions.to_bytes(4, "little", signed=True)
        + identity
    ).digest()[:5]
    content = f"BT /F0 12 Tf 20 100 Td ({text}) Tj ET".encode()
    object_key = hashlib.md5(key + (4).to_bytes(3, "little") + bytes(2)).digest()[:10]
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 400 200]/Contents 4 0 R/Resources<</Font<</F0 "
        b"5 0 R>>>>>>",
        stream(_rc4(object_key, content)),
        b"<</Type/Font/Subtype/Type1/BaseFont/Courier>>",
        f"<</Filter/Standard/V 1/R 2/O<{owner.hex()}>/U<{_rc4(key, _PADDING).hex()}>"
        f"/P {permissions}>>".encode(),
    ]
    return assemble(objects, f"/Encrypt 6 0 R/ID[<{identity.hex()}><{identity.hex()}>]")


def _rc4(key: bytes, data: bytes) -> bytes:
    state = list(range(256))
    j = 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    result, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        result.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(result)


def render(file: bytes, page: int = 0, scale: float = 2.0, turn: int = 0) -> NDArray[np.uint8]:
    """A page as the PDF library's own Python interface renders it, [h, w, 3].

    `turn` is in degrees, clockwise from how the page is displayed.
    """
    import pypdfium2

    with pypdfium2.PdfDocument(file) as document:
        bitmap = document[page].render(
            scale=scale, rotation=turn, may_draw_forms=False, rev_byteorder=True
        )
        return bitmap.to_numpy()[..., :3].copy()


def distance(one: str, other: str) -> float:
    """Levenshtein distance over the longer length."""
    row = np.arange(len(other) + 1)
    codes = np.array([ord(char) for char in other])
    for number, char in enumerate(one, start=1):
        changed = row[:-1] + (codes != ord(char))
        best = np.minimum(changed, row[1:] + 1)
        # Insertions run on along the row: a running minimum of what is left of the slope.
        whole = np.concatenate([[number], best])
        steps = np.arange(len(whole))
        row = np.minimum.accumulate(whole - steps) + steps
    return float(row[-1]) / max(len(one), len(other), 1)
