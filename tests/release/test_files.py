"""The small files of a release: those of an import come back, a trained model's are its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlm.data.tokenizer import Tokenizer, byte_tokenizer
from tests.release.folders import write_folder

pytestmark = pytest.mark.unit


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
        assert found[name] == config.get(name), name
    # Code of our own, in place of theirs; but no processor, which knows only our tokens.
    assert not (tmp_path / "back" / "modeling_dots.py").exists()
    assert (tmp_path / "back" / "modeling_megatron_vlm.py").is_file()
    assert sorted(found["auto_map"]) == [
        "AutoConfig",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
    ]


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
    assert generation["eos_token_id"] == [ours.eos_id, ours.special("end")]
    assert (tmp_path / "back" / "README.md").read_text() == "# A model\n"
    assert (tmp_path / "back" / "chat_template.jinja").is_file()


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
