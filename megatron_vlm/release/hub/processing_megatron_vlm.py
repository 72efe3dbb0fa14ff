"""Pictures and text as the model was trained on them.

`MegatronVlmImageProcessor` turns a picture into normalised patches by the very arithmetic of the
training data; `MegatronVlmProcessor` puts as many placeholders into the text as the pictures have
tokens. Written by megatron-vlm; needs nothing but transformers, torch and Pillow.
"""

from __future__ import annotations

import math
from base64 import b64decode
from inspect import signature
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

MAX_ASPECT_RATIO = 200
"""Longer side over shorter side of the flattest picture taken."""
DOWNLOAD_SECONDS = 60


class MegatronVlmImageProcessor(BaseImageProcessor):
    """Pictures of any sizes to normalised patches."""

    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(
        self,
        min_pixels: int = 3136,
        max_pixels: int = 11289600,
        patch_size: int = 14,
        temporal_patch_size: int = 1,
        merge_size: int = 2,
        image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073),
        image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711),
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.patch_size, self.merge_size = patch_size, merge_size
        self.temporal_patch_size = temporal_patch_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        """Cut pictures into patches.

        Args:
            images: one or a list (or lists) of Pillow images, uint8 arrays [height, width, 3],
                paths, addresses, or encoded pictures as bytes or in base64.
            return_tensors: `pt` for torch, `np` for numpy.

        Returns:
            `pixel_values` float32, all pictures' patches one after another, and `image_grid_thw`
            int64: one frame, patches along height and width.
        """
        pictures = [self.to_patches(to_rgb(image)) for image in _flat(self.fetch_images(images))]
        data = {
            "pixel_values": np.concatenate([patches for patches, _ in pictures]),
            "image_grid_thw": np.array([(1, *grid) for _, grid in pictures], dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def fetch_images(self, images):
        """Open what is given as a path, an address, bytes or base64; nothing is converted yet."""
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        return open_picture(images)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that a picture is resized to: dots.ocr's published rule.

        Both are multiples of `patch_size * merge_size`, near the aspect, and their product lies
        within `min_pixels` and `max_pixels`.
        """
        shorter, longer = sorted((height, width))
        if shorter < 1 or longer > MAX_ASPECT_RATIO * shorter:
            raise ValueError(
                f"picture of {height}x{width} pixels: expected sides of at least 1 and at most "
                f"{MAX_ASPECT_RATIO} times each other"
            )
        unit = self.patch_size * self.merge_size
        most, least = self.max_pixels // unit**2, -(-self.min_pixels // unit**2)
        # In blocks of patches.
        rows, columns = max(1, round(height / unit)), max(1, round(width / unit))
        if rows * columns < least:
            enlarge = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * enlarge / unit), math.ceil(width * enlarge / unit)
        if rows * columns > most:
            reduce = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / reduce / unit))
            columns = max(1, math.floor(width / reduce / unit))
        # A side held up at one block leaves the other too long.
        if rows > columns:
            rows = min(rows, most // columns)
        else:
            columns = min(columns, most // rows)
        return rows * unit, columns * unit

    def to_patches(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Patches of an RGB picture, float32 [patches, 3 * patch_size**2], and their grid.

        Blocks of `merge_size` x `merge_size` patches come one after another, so that merging them
        is a reshape. Each patch is channels first.
        """
        patch, merge = self.patch_size, self.merge_size
        height, width = self.target_size(image.height, image.width)
        rows, columns = height // patch, width // patch
        blocks = resize(np.array(image), height, width).reshape(
            rows // merge, merge, patch, columns // merge, merge, patch, 3
        )
        flat = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3 * patch**2)
        deviation = np.asarray(self.image_std, dtype=np.float64)
        scale = np.repeat(1 / (255 * deviation), patch**2).astype(np.float32)
        shift = np.repeat(np.asarray(self.image_mean) / deviation, patch**2).astype(np.float32)
        return flat * scale - shift, (rows, columns)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialias, as in training: one axis after the other.

    Args:
        image: uint8 [rows, columns, 3].
        height: of the result.
        width: likewise.

    Returns:
        uint8 [height, width, 3].
    """
    rows, columns = image.shape[:2]
    height_first = rows - height > max(0, 2 * (columns - width))
    for size in ((height, columns) if height_first else (rows, width), (height, width)):
        if size != image.shape[:2]:
            planes = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
            planes = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)
            image = planes[0].permute(1, 2, 0).numpy()
    return image


def open_picture(source) -> Image.Image:
    """A Pillow image of whatever may stand for one."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        with urlopen(source, timeout=DOWNLOAD_SECONDS) as answer:
            source = answer.read()
    elif isinstance(source, str) and not _is_file(source):
        try:
            source = b64decode(source, validate=True)
        except ValueError as error:
            raise ValueError(f"{source[:80]!r}: no such file, no address and no base64") from error
    if isinstance(source, str | Path | bytes):
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source)
    raise TypeError(
        f"a picture as {type(source).__name__}: expected a Pillow image, a uint8 array "
        "[height, width, 3], a path, an address, bytes or base64"
    )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:
        # Longer than a name may be, as base64 is.
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, transparency over white, gray and CMYK to 8-bit RGB."""
    if image.mode in ("F", "LAB"):
        raise ValueError(f"picture of mode {image.mode} has no agreed RGB; convert it first")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("picture has integers beyond 16 bits, which have no agreed gray")
        image = Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image)
    return image.convert("RGB")


def _flat(images) -> list[Image.Image]:
    if isinstance(images, list | tuple):
        return [image for part in images for image in _flat(part)]
    return [images]


class MegatronVlmProcessor(ProcessorMixin):
    """Text and pictures to the model's inputs.

    `image_token` stands once for each picture in a text; it is repeated to the picture's number of
    tokens, one for each block of `merge_size` x `merge_size` patches.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, image_token=None):
        self.image_token = image_token or getattr(tokenizer, "image_token", "<|image|>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What takes the place of picture `image_idx`'s placeholder."""
        patches = int(np.prod(np.asarray(image_inputs["image_grid_thw"][image_idx])))
        return self.image_token * (patches // self.image_processor.merge_size**2)

    def apply_chat_template(self, conversation, *args, tokenize=False, **kwargs):
        """A conversation as text or, with `tokenize`, as the model's inputs.

        In tokens, messages that spell a special token are the characters they are made of.
        """
        # Older releases of transformers 5 do not know it, and read them as special tokens.
        known = "sanitize_control_tokens" in signature(super().apply_chat_template).parameters
        if tokenize and known and not kwargs.get("return_assistant_tokens_mask"):
            kwargs.setdefault("sanitize_control_tokens", True)
        return super().apply_chat_template(conversation, *args, tokenize=tokenize, **kwargs)
