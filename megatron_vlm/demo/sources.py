"""Where the demo's pictures come from: real data already on the machine, split before any use.

Handwritten digits and photographs ship inside installed packages, the text is that of free
licences. Nothing is ever downloaded: package files are opened by path, never through loaders
that may fetch. Each source is divided here, once, into what trains and what is held out, so
that nothing drawn later can mix the two. DATA_LICENSES.md lists every source and its terms.
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFont

from megatron_vlm.errors import DataError, UserError

Split = Literal["train", "heldout"]

HELDOUT_DIGITS = 0.2
"""Share of the instances of each digit that is held out. Our choice: 360 of 1,797 are enough
that a held-out set of a few hundred questions does not repeat itself."""

HELDOUT_PHOTOGRAPH = 0.25
"""Share of each photograph's height, at its bottom, that is held out. Our choice: bottoms still
show the subject (coins, coat, petals) where right edges are often bare background."""

HELDOUT_TEXT = 8
"""One line in this many is held out, and of its pieces again one in this many. Our choice."""

MAX_PIECE_CHARACTERS = 20
"""Longest piece of text. Our choice: at most about seven language tokens wide when drawn."""

LICENCES_FOLDER = Path("/usr/share/common-licenses")
"""Where Debian, Ubuntu and their descendants keep the texts of common licences."""

FALLBACK_DISTRIBUTIONS = ("numpy", "pillow", "scikit-learn", "scikit-image", "matplotlib", "torch")
"""Installed packages whose licence files are read where LICENCES_FOLDER is missing."""

# (package, file, answer). Only pictures whose terms their package states plainly; the blurred
# clock is left out because its held-out strip is bare wall.
_PHOTOGRAPHS = (
    ("scikit-image", "astronaut.png", "astronaut"),
    ("scikit-image", "brick.png", "bricks"),
    ("scikit-image", "camera.png", "cameraman"),
    ("scikit-image", "chelsea.png", "cat"),
    ("scikit-image", "coffee.png", "coffee"),
    ("scikit-image", "coins.png", "coins"),
    ("scikit-image", "grass.png", "grass"),
    ("scikit-image", "gravel.png", "gravel"),
    ("scikit-image", "hubble_deep_field.jpg", "galaxies"),
    ("scikit-image", "ihc.png", "tissue"),
    ("scikit-image", "retina.jpg", "retina"),
    ("scikit-image", "rocket.jpg", "rocket"),
    ("scikit-learn", "china.jpg", "temple"),
    ("scikit-learn", "flower.jpg", "flower"),
)
_PICTURE_FOLDERS = {
    "scikit-image": ("skimage", "data"),
    "scikit-learn": ("sklearn", "datasets/images"),
}
_DEJAVU = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
EMBEDDED_FONT = "Aileron-Regular"
"""Name under which provenance lists the TrueType font embedded in Pillow."""

_WORD = re.compile(r"[A-Za-z0-9(][A-Za-z0-9'-]*[A-Za-z0-9][.,;:)]?|[A-Za-z]")
_LICENCE_FILE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: `images` uint8 `[n, 8, 8]` (ink is 255), `values` and `indices` `[n]`.

    `indices` are rows of scikit-learn's `load_digits()`.
    """

    images: np.ndarray
    values: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class Photograph:
    """A photograph and the part of it that one split may show.

    `picture` is RGB and holds that part alone; `top` is how many pixels of the whole
    photograph lie above it.
    """

    package: str
    file: str
    answer: str
    picture: Image.Image
    top: int


@dataclass(frozen=True)
class TextPiece:
    """One to three words, and the line of the file (counted from 1) that they stand in."""

    words: str
    line: str
    file: str
    line_number: int


@dataclass(frozen=True)
class Material:
    """All that one split may draw from."""

    digits: Digits
    photographs: tuple[Photograph, ...]
    pieces: tuple[TextPiece, ...]
    fonts: tuple[str, ...]


@dataclass(frozen=True)
class Sources:
    """The material of both splits, and in words where the text was found."""

    train: Material
    heldout: Material
    text_source: str

    def of(self, split: Split) -> Material:
        """The material of one split."""
        return self.train if split == "train" else self.heldout


def load(seed: int) -> Sources:
    """Open every source and split it; the same seed splits the same way.

    Raises UserError if a package is missing, DataError if what it ships cannot be used.
    """
    digits = _split_digits(_read_digits(), seed)
    photographs = _split_photographs()
    lines, text_source = _read_lines()
    pieces = _split_text(lines, seed)
    for split, found in pieces.items():
        if len(found) < 100:
            raise DataError(
                f"{text_source}: {len(found)} pieces of {split} text found, expected at least 100; "
                "install Debian's base-files or reinstall megatron-vlm[demo]"
            )
    fonts = (*(str(path) for path in _dejavu_files()), EMBEDDED_FONT)
    train, heldout = (
        Material(digits[split], photographs[split], pieces[split], fonts)
        for split in ("train", "heldout")
    )
    return Sources(train, heldout, text_source)


@lru_cache(maxsize=64)
def font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of a TrueType file, or Pillow's embedded one, at `size` pixels per em."""
    if name == EMBEDDED_FONT:
        return ImageFont.load_default(size=size)
    # The basic layout engine is in every build of Pillow, so pictures are the same everywhere.
    return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)


def sheet_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A sans-serif font for answer sheets: DejaVu if matplotlib is installed, else Pillow's own."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return font(EMBEDDED_FONT, size)
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return font(str(Path(spec.origin).parent / "mpl-data/fonts/ttf" / name), size)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(package) from error


def _package_folder(name: str, package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise _missing(package)
    return Path(spec.origin).parent


def _missing(package: str) -> UserError:
    return UserError(
        f"{package} is not installed, and the demo takes real data from it; "
        "run: pip install megatron-vlm[demo]"
    )


def _read_digits() -> Digits:
    bunch = _module("sklearn.datasets", "scikit-learn").load_digits()
    # 8x8 counts of 0..16 inked dots become 0..255.
    images = np.minimum(bunch.images * 16, 255).astype(np.uint8)
    return Digits(images, bunch.target.astype(np.int64), np.arange(len(images)))


def _split_digits(digits: Digits, seed: int) -> dict[Split, Digits]:
    """Hold out HELDOUT_DIGITS of each digit's instances, so that all ten stay as frequent."""
    rng = np.random.default_rng([seed, zlib.crc32(b"digits")])
    held = np.zeros(len(digits.values), dtype=bool)
    for value in range(10):
        rows = np.flatnonzero(digits.values == value)
        held[rng.permutation(rows)[: round(len(rows) * HELDOUT_DIGITS)]] = True

    def part(mask: np.ndarray) -> Digits:
        return Digits(digits.images[mask], digits.values[mask], digits.indices[mask])

    return {"train": part(~held), "heldout": part(held)}


def _split_photographs() -> dict[Split, tuple[Photograph, ...]]:
    """Cut every photograph in two: its top trains, its bottom is held out.

    The halves become separate pictures, so no later crop or resize can reach across the cut.
    """
    halves: dict[Split, list[Photograph]] = {"train": [], "heldout": []}
    for package, file, answer in _PHOTOGRAPHS:
        module, folder = _PICTURE_FOLDERS[package]
        path = _package_folder(module, package) / folder / file
        if not path.exists():
            # Another version of the package may ship fewer pictures; the summary counts them.
            continue
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
        cut = round(whole.height * (1 - HELDOUT_PHOTOGRAPH))
        top = whole.crop((0, 0, whole.width, cut))
        bottom = whole.crop((0, cut, whole.width, whole.height))
        halves["train"].append(Photograph(package, file, answer, top, 0))
        halves["heldout"].append(Photograph(package, file, answer, bottom, cut))
    if len(halves["train"]) < 2:
        raise DataError(
            f"scikit-image and scikit-learn: {len(halves['train'])} bundled photographs found, "
            f"expected {len(_PHOTOGRAPHS)}; reinstall megatron-vlm[demo]"
        )
    return {"train": tuple(halves["train"]), "heldout": tuple(halves["heldout"])}


def _dejavu_files() -> list[Path]:
    folder = _package_folder("matplotlib", "matplotlib") / "mpl-data/fonts/ttf"
    files = [folder / f"{name}.ttf" for name in _DEJAVU]
    for path in files:
        if not path.exists():
            raise DataError(f"{path}: not found; reinstall matplotlib, which ships this font")
    return files


def _read_lines() -> tuple[list[tuple[str, int, str]], str]:
    """`(file, line number, line)` of every licence text, and in words where they were found."""
    files = {
        f"common-licenses/{path.name}": path
        for path in sorted(LICENCES_FOLDER.glob("*"))
        # Links such as GPL -> GPL-3 would only repeat a text.
        if path.is_file() and not path.is_symlink()
    }
    where = str(LICENCES_FOLDER)
    if not files:
        files = dict(_licence_files_of_packages())
        where = f"licence files of installed packages ({LICENCES_FOLDER} is missing)"
    lines = []
    for name, path in files.items():
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            lines.append((name, number, " ".join(line.split())))
    return lines, where


def _licence_files_of_packages() -> Iterator[tuple[str, Path]]:
    for name in FALLBACK_DISTRIBUTIONS:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        for file in sorted(files, key=str):
            path = Path(str(file.locate()))
            if _LICENCE_FILE.search(str(file)) and path.suffix != ".py" and path.is_file():
                yield f"{name}: {file}", path


def _split_text(lines: list[tuple[str, int, str]], seed: int) -> dict[Split, tuple[TextPiece, ...]]:
    """Cut lines into pieces of one to three words. Neither a held-out line nor a held-out piece
    occurs in training: the text itself decides by its checksum, and licences share many lines.
    """
    pieces: dict[Split, list[TextPiece]] = {"train": [], "heldout": []}
    seen: set[str] = set()
    for file, number, line in lines:
        if line in seen:
            continue
        seen.add(line)
        words = line.split()
        if len(words) < 2:
            continue
        split = _split_of(line, seed)
        for count in (1, 2, 3):
            for start in range(len(words) - count + 1):
                chosen = words[start : start + count]
                text = " ".join(chosen)
                if (
                    1 < len(text) <= MAX_PIECE_CHARACTERS
                    and all(_WORD.fullmatch(word) for word in chosen)
                    and _split_of(text, seed) == split
                ):
                    pieces[split].append(TextPiece(text, line, file, number))
    return {"train": tuple(pieces["train"]), "heldout": tuple(pieces["heldout"])}


def _split_of(text: str, seed: int) -> Split:
    held = zlib.crc32(f"{seed}:{text}".encode()) % HELDOUT_TEXT == 0
    return "heldout" if held else "train"
