"""The small files of a release: a tokenizer and a chat template that say what our own code says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.chat import Turn, encode_conversation, encode_prompt
from megatron_vlm.data.tokenizer import Tokenizer, byte_tokenizer
from tests.release.folders import write_folder

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer from the files that an export writes."""
    from transformers import AutoTokenizer

    from megatron_vlm.release.files import tokenizer_files

    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(byte_tokenizer(), 512).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "dots1"}')
    return AutoTokenizer.from_pretrained(folder)


def _ids(theirs: Any, messages: list[dict[str, Any]], prompt: bool) -> list[int]:
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    whole = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert theirs.encode(text, add_special_tokens=False) == whole
    return list(whole)


def _image() -> dict[str, str]:
    return {"type": "image"}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


PROMPTS: dict[str, tuple[Any, str, int]] = {
    "text": ("Wie geht's?\n ok", "Wie geht's?\n ok", 0),
    "not ascii": ("今日は 🙂", "今日は 🙂", 0),
    "a mark": ("<image>\nWhat?", "<image>\nWhat?", 1),
    "marks inside": ("a<image>b <image>", "a<image>b <image>", 2),
    "a picture first": ([_image(), _text("What?")], "What?", 1),
    "two pictures first": ([_image(), _image(), _text("What?")], "What?", 2),
    "a picture inside": ([_text("See "), _image(), _text("?")], "See <image>?", 1),
    "pictures apart": ([_text("a"), _image(), _image(), _text("b")], "a<image><image>b", 2),
    "text in parts": ([_text("a"), _text(" b")], "a b", 0),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_those_of_our_data(name: str, theirs: Any) -> None:
    content, text, pictures = PROMPTS[name]
    found = _ids(theirs, [{"role": "user", "content": content}], prompt=True)
    assert found == encode_prompt(byte_tokenizer(), text, pictures)


def test_conversations_are_those_of_our_data(theirs: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [_image(), _text("What?")]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [_image(), _text("And here?")]},
        {"role": "assistant", "content": "a dog"},
    ]
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "<image>\nWhat?"),
        Turn("assistant", "a cat"),
        # Only the first turn opens with pictures; later ones stand where they are.
        Turn("user", "<image>And here?"),
        Turn("assistant", "a dog"),
    ]
    expected, _ = encode_conversation(byte_tokenizer(), turns, 2)
    assert _ids(theirs, messages, prompt=False) == expected


def test_special_tokens_are_known(theirs: Any) -> None:
    ours = byte_tokenizer()
    assert theirs.eos_token_id == ours.eos_id and theirs.pad_token_id == ours.pad_id
    assert theirs.bos_token_id is None
    ids = [*ours.encode("word"), ours.special("end"), ours.eos_id]
    assert theirs.decode(ids, skip_special_tokens=True) == "word"


def test_a_foreign_tokenizer_comes_back_as_it_was(tmp_path: Path) -> None:
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    write_folder(tmp_path / "theirs", "dots_ocr")
    kept = {
        "tokenizer.json": byte_tokenizer().to_json().encode(),
        "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b'{"eos_token_id": [7, 8]}',
        "preprocessor_config.json": json.dumps(
            {"min_pixels": 784, "max_pixels": 50176, "image_mean": [0.5, 0.5, 0.5]}
        ).encode(),
    }
    for name, content in kept.items():
        (tmp_path / "theirs" / name).write_bytes(content)
    (tmp_path / "theirs" / "modeling_dots.py").write_text("raise SystemExit")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config |= {"eos_token_id": [7, 8], "bos_token_id": 3, "image_token_id": 57}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    imported = import_folder(tmp_path / "theirs", tmp_path / "ours")
    vision = imported.model.vision
    assert vision is not None
    assert (vision.min_pixels, vision.max_pixels) == (784, 50176)
    assert vision.image_mean == (0.5, 0.5, 0.5)
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    for name, content in kept.items():
        assert (tmp_path / "back" / name).read_bytes() == content
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    for name in ("eos_token_id", "bos_token_id", "image_token_id", "video_token_id"):
        assert found[name] == config.get(name, 151656)
    assert not list((tmp_path / "back").glob("*.py"))


def test_files_of_a_trained_model(tmp_path: Path) -> None:
    """Its own tokenizer's ids, and more files by whoever asks for them."""
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    write_folder(tmp_path / "theirs", "dots1", vocab_size=384)
    imported = import_folder(tmp_path / "theirs", tmp_path / "ours")
    _as_if_trained(imported.checkpoint)
    export_checkpoint(
        tmp_path / "ours", tmp_path / "back", extra_files={"README.md": b"# A model\n"}
    )
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    ours = Tokenizer.load(tmp_path / "back" / "tokenizer.json")
    assert (config["eos_token_id"], config["pad_token_id"]) == (ours.eos_id, ours.pad_id)
    assert "image_token_id" not in config
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ours.special("end"), ours.eos_id]
    assert (tmp_path / "back" / "README.md").read_text() == "# A model\n"
    template = (tmp_path / "back" / "chat_template.jinja").read_text()
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == template


def _as_if_trained(checkpoint: Path) -> None:
    """Our tokenizer in place of what an import has kept."""
    import shutil

    from megatron_vlm.checkpoint.folder import digest

    shutil.rmtree(checkpoint / "huggingface")
    file = checkpoint / "tokenizer.json"
    file.write_text(byte_tokenizer().to_json())
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {
        name: entry
        for name, entry in manifest["files"].items()
        if not name.startswith("huggingface/")
    }
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
