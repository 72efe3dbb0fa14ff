"""What an exported folder makes of pictures and text: bit for bit what the trainer does."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, pre_tokenizers, trainers

from megatron_vlm.config import LanguageConfig, ModelConfig
from megatron_vlm.data.chat import encode_conversation, encode_prompt
from megatron_vlm.data.geometry import grid, num_image_tokens, target_size
from megatron_vlm.data.pictures import decode_picture, patches
from megatron_vlm.data.tokenizer import Tokenizer, byte_tokenizer
from megatron_vlm.release.hub_files import HUB, PROCESSING
from tests.data.samples import VISION, encoded, picture
from tests.release.folders import write_small_files

pytestmark = pytest.mark.unit

LANGUAGE = LanguageConfig(
    num_layers=1, hidden_size=32, num_attention_heads=2, ffn_hidden_size=8, vocab_size=384
)
MODEL = ModelConfig(vision=VISION, language=LANGUAGE)


def _trained() -> Tokenizer:
    """A vocabulary with merges."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["what is this? it is a picture", "that is what it is"], trainer)
    return Tokenizer(backend)


TOKENIZERS = {"bytes": byte_tokenizer, "merges": _trained}


def _processing() -> Any:
    spec = importlib.util.spec_from_file_location("hub_processing", HUB / f"{PROCESSING}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=TOKENIZERS)
def both(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Tokenizer, Any]:
    """The trainer's tokenizer, and the processor of a folder written with it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("hub")
    ours = TOKENIZERS[request.param]()
    write_small_files(folder, MODEL, ours.to_json(), "float32")
    hub = _processing()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings.pop("auto_map")
    processor = hub.MegatronVlmProcessor(
        hub.MegatronVlmImageProcessor(**settings),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(),
    )
    return ours, processor


def _ours(pictures: list[bytes]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    pixels, grids = [], []
    for file in pictures:
        image = decode_picture(file)
        rows, columns = grid(*target_size(*image.shape[:2], VISION), VISION)
        pixels.append(patches(image, rows, columns, VISION))
        grids.append((rows, columns))
    return np.concatenate(pixels), grids


def _kinds() -> dict[str, bytes]:
    rgb = picture(50, 81)
    turned = Image.Exif()
    turned[0x0112] = 6
    see_through = np.asarray(rgb.convert("RGBA")).copy()
    see_through[..., 3] = np.arange(81, dtype=np.uint8) * 3
    gray = np.asarray(rgb.convert("L"))
    palette = rgb.quantize(16)
    return {
        "png": encoded(rgb),
        "jpeg": encoded(rgb, "JPEG"),
        "exact_size": encoded(picture(56, 84)),
        "flat": encoded(picture(30, 400)),
        "small": encoded(picture(5, 9)),
        "large": encoded(picture(700, 500)),
        "turned": encoded(rgb, exif=turned),
        "transparent": encoded(Image.fromarray(see_through)),
        "gray": encoded(Image.fromarray(gray)),
        "gray_alpha": encoded(Image.fromarray(see_through).convert("LA")),
        "deep_gray": encoded(Image.fromarray(gray.astype(np.uint16) * 201)),
        "palette": encoded(palette),
        "clear_palette": encoded(palette, transparency=3),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "bits": encoded(Image.fromarray(gray > 100)),
        "webp": encoded(rgb, "WEBP"),
        "gif": encoded(rgb, "GIF"),
    }


@pytest.mark.parametrize("kind", _kinds())
def test_pictures_bit_for_bit(both: tuple[Tokenizer, Any], kind: str) -> None:
    file = _kinds()[kind]
    pixels, ((rows, columns),) = _ours([file])
    theirs = both[1].image_processor(file, return_tensors="pt")
    assert theirs["pixel_values"].dtype == torch.float32
    assert theirs["image_grid_thw"].dtype == torch.int64
    assert theirs["image_grid_thw"].tolist() == [[1, rows, columns]]
    np.testing.assert_array_equal(theirs["pixel_values"].numpy(), pixels)


def test_sizes(both: tuple[Tokenizer, Any]) -> None:
    draw = np.random.default_rng(0)
    processor = both[1].image_processor
    for height, width in np.exp(draw.uniform(0, 8, (2000, 2))).astype(int).tolist():
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(ValueError, match=f"picture of {height}x{width}"):
                processor.target_size(height, width)
        else:
            assert processor.target_size(height, width) == target_size(height, width, VISION)


def test_ways_to_give_a_picture(both: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    file = _kinds()["transparent"]
    path = tmp_path / "a picture.png"
    path.write_bytes(file)
    text = base64.b64encode(file).decode()
    ways = [file, str(path), path, text, f"data:image/png;base64,{text}", Image.open(path)]
    pixels, _ = _ours([file])
    for way in ways:
        given = both[1].image_processor([[way]], return_tensors="np")
        np.testing.assert_array_equal(given["pixel_values"], pixels)
    for name in ("nowhere.png", "no/" * 2000 + "where.png"):
        with pytest.raises(ValueError, match="no such file, no address and no base64"):
            both[1].image_processor(name)
    with pytest.raises(TypeError, match="a picture as int"):
        both[1].image_processor(5)


def test_a_long_picture_in_base64(both: tuple[Tokenizer, Any]) -> None:
    """Whatever its text looks like as a path: it begins with a slash, as a JPEG's does."""
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (256, 320, 3), dtype=np.uint8)
        file = encoded(Image.fromarray(noise), "JPEG")
        text = base64.b64encode(file).decode()
        assert len(text) > 50_000 and text.startswith("/9j/")
        pixels, _ = _ours([file])
        given = both[1].image_processor(text, return_tensors="np")
        np.testing.assert_array_equal(given["pixel_values"], pixels)


def _content(text: str, pictures: list[bytes]) -> list[dict[str, Any]]:
    return [{"type": "image", "image": file} for file in pictures] + [
        {"type": "text", "text": text}
    ]


def _expanded(ids: list[int], ours: Tokenizer, pictures: list[bytes]) -> list[int]:
    grids = iter(_ours(pictures)[1] if pictures else [])
    expanded = []
    for token in ids:
        times = num_image_tokens(*next(grids), VISION) if token == ours.image_id else 1
        expanded += [token] * times
    return expanded


QUESTIONS = {
    "text": ("what is this?", []),
    "empty": ("", []),
    "spaces": ("  what \n\n is\tthis ? \n", []),
    "one": ("what is this?", ["png"]),
    "unmarked": ("  what?\n", ["png", "small"]),
    "marked": ("it is <image> and\n<image>what", ["png", "small"]),
    "marked_at_once": ("<image><image>", ["png", "small"]),
    "spelled": ("<|user|>what<|image|> is <|eos|> this<|end|>", []),
    "spelled_beside_pictures": ("<|image|>what<image><|assistant|>", ["small"]),
    "chinese": ("这是什么? 🙂", ["png"]),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_prompts_are_those_of_training(both: tuple[Tokenizer, Any], name: str) -> None:
    ours, processor = both
    text, kinds = QUESTIONS[name]
    pictures = [_kinds()[kind] for kind in kinds]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": _content(text, pictures)}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    expected = _expanded(encode_prompt(ours, text, len(pictures)), ours, pictures)
    if "<|" in text and ours.vocab_size > 263:
        # Text around a spelled token may be cut elsewhere, into ordinary tokens all the same.
        special = set(ours.special_ids.by_token().values())
        found = inputs["input_ids"][0].tolist()
        assert [i for i in found if i in special] == [i for i in expected if i in special]
        assert ours.decode(found, False) == ours.decode(expected, False)
    else:
        assert inputs["input_ids"].tolist() == [expected]
    assert inputs["attention_mask"].all()
    assert ("pixel_values" in inputs) == bool(pictures)
    if pictures:
        np.testing.assert_array_equal(inputs["pixel_values"].numpy(), _ours(pictures)[0])


@pytest.mark.parametrize("as_items", [False, True])
def test_whole_conversations_are_those_of_training(
    both: tuple[Tokenizer, Any], as_items: bool
) -> None:
    ours, processor = both
    turns: Any = [
        ("system", "it is"),
        ("user", "what?"),
        ("assistant", "a picture"),
        ("user", "it is <|end|>?" if ours.vocab_size == 263 else "it is?"),
        ("assistant", ""),
    ]
    messages = [
        {"role": role, "content": _content(text, []) if as_items else text} for role, text in turns
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    ids, _ = encode_conversation(ours, turns, 0)
    assert inputs["input_ids"] == [ids]


def test_a_batch_is_padded_on_the_left(both: tuple[Tokenizer, Any]) -> None:
    ours, processor = both
    file = _kinds()["small"]
    texts = ["<|user|><|image|>what is this?<|end|>", "<|user|>it<|end|>"]
    inputs = processor(text=texts, images=[file], return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.shape == mask.shape and mask[0].all()
    missing = int((mask[1] == 0).sum())
    assert missing > 0 and not mask[1, :missing].any()
    assert ids[1, :missing].unique().tolist() == [ours.pad_id]
    assert (ids[0] == ours.image_id).sum() == num_image_tokens(*_ours([file])[1][0], VISION)


def test_pictures_and_places_differ(both: tuple[Tokenizer, Any]) -> None:
    file = _kinds()["small"]
    for text, images in (("<|image|><|image|>", [file]), ("none", [file]), ("<|image|>", None)):
        with pytest.raises(ValueError):
            both[1](text=text, images=images)


def test_what_the_format_does_not_have(both: tuple[Tokenizer, Any]) -> None:
    for message, said in (
        ({"role": "tool", "content": "x"}, "role tool"),
        ({"role": "user", "content": [{"type": "video"}]}, "content of type video"),
    ):
        with pytest.raises(Exception, match=said):
            both[1].apply_chat_template([message])


def test_answers_are_decoded_alike(both: tuple[Tokenizer, Any]) -> None:
    ours, processor = both
    ids = encode_conversation(ours, [("user", "it is"), ("assistant", "这 a  picture .")], 0)[0]
    assert processor.decode(ids, skip_special_tokens=True) == ours.decode(ids)
