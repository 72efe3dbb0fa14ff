"""The small files of a release: those of an import come back, a trained model's are its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.tokenizer import Tokenizer, byte_tokenizer
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf.families import read_model
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


REMOTE = "configuration_dots.DotsVLProcessor"
OURS = "processing_megatron_vlm.MegatronVlmProcessor"


def _with_settings(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """A dots.ocr folder with a tokenizer and these settings; config.json is added to."""
    write_folder(folder, "dots_ocr", vocab_size=384)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())
    for name, values in files.items():
        before = json.loads((folder / name).read_text()) if name == "config.json" else {}
        (folder / name).write_text(json.dumps(before | values))


def _through(folder: Path) -> Path:
    """Imported from `folder` and exported again."""
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    import_folder(folder, folder.parent / "ours")
    export_checkpoint(folder.parent / "ours", folder.parent / "back")
    return folder.parent / "back"


@pytest.mark.parametrize("place", ["preprocessor_config.json", "config.json"])
def test_code_that_does_not_come_back_is_not_named(place: str, tmp_path: Path) -> None:
    """Wherever the processor's code is named; transformers loads what is left."""
    from tests.release.test_hub_models import run_outside

    files: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {
            "min_pixels": 784,
            "processor_class": "DotsVLProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "DotsVLProcessor",
            "auto_map": {"AutoTokenizer": ["tokenization_dots.Slow", None]},
        },
        "generation_config.json": {"auto_map": None, "processor_class": [1], "do_sample": False},
    }
    files.setdefault(place, {})["auto_map"] = {"AutoProcessor": REMOTE}
    _with_settings(tmp_path / "theirs", files)
    back = _through(tmp_path / "theirs")
    found = {name: json.loads((back / name).read_text()) for name in (*files, "config.json")}
    assert found["preprocessor_config.json"] == {
        "min_pixels": 784,
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    assert found["tokenizer_config.json"] == {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert found["generation_config.json"] == {"processor_class": [1], "do_sample": False}
    assert "AutoProcessor" not in found["config.json"]["auto_map"]
    run_outside(tmp_path, "processor", back, "PreTrainedTokenizerBase")


def test_code_of_ours_comes_back(tmp_path: Path) -> None:
    from tests.release.folders import write_small_files
    from tests.release.test_hub_models import run_outside

    _with_settings(tmp_path / "theirs", {})
    (tmp_path / "first").mkdir()
    _, model = read_model(json.loads((tmp_path / "theirs/config.json").read_text()), "config.json")
    write_small_files(tmp_path / "first", model, byte_tokenizer().to_json(), "bfloat16")
    kept = {
        file.name: file.read_bytes()
        for file in (tmp_path / "first").iterdir()
        if file.name != "config.json"
    }
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    for name, content in kept.items():
        (tmp_path / "theirs" / name).write_bytes(content)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    back = _through(tmp_path / "theirs")
    assert {name: (back / name).read_bytes() for name in kept} == kept
    assert json.loads((back / "config.json").read_text()) == config
    assert config["auto_map"]["AutoProcessor"] == OURS
    run_outside(tmp_path, "processor", back, "MegatronVlmProcessor")


@pytest.mark.parametrize("auto_map", [None, {"AutoProcessor": "processing_other.OtherProcessor"}])
def test_another_processor_is_not_ours(auto_map: Any, tmp_path: Path) -> None:
    _with_settings(tmp_path / "theirs", {"config.json": {"auto_map": auto_map}})
    config = json.loads((_through(tmp_path / "theirs") / "config.json").read_text())
    assert sorted(config["auto_map"]) == [
        "AutoConfig",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("generation_config.json", "{", "generation_config.json: cannot be read"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: holds a list; expected an object"),
    ],
)
def test_settings_that_cannot_be_read(name: str, text: str, message: str, tmp_path: Path) -> None:
    """Told by the import, not by an export after training."""
    from megatron_vlm.release.importing import import_folder

    write_folder(tmp_path / "theirs", "qwen2")
    (tmp_path / "theirs" / name).write_text(text)
    with pytest.raises(ConversionError, match=message):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


NEWER = {"size": {"shortest_edge": 784, "longest_edge": 50176}, "do_normalize": True}


@pytest.mark.parametrize("older", [True, False])
def test_picture_settings_as_transformers_saves_them(older: bool, tmp_path: Path) -> None:
    """Areas are edges of `size` in its newer files, which may be a part of the processor's."""
    from transformers import Qwen2VLImageProcessorPil

    from megatron_vlm.release.importing import import_folder

    write_folder(tmp_path / "theirs", "dots_ocr")
    Qwen2VLImageProcessorPil(
        min_pixels=784,
        max_pixels=50176,
        patch_size=14,
        temporal_patch_size=1,
        merge_size=2,
        image_mean=[0.5, 0.25, 0.5],
    ).save_pretrained(tmp_path / "theirs")
    if not older:
        file = tmp_path / "theirs" / "preprocessor_config.json"
        part = {"image_processor": json.loads(file.read_text())}
        file.unlink()
        (tmp_path / "theirs" / "processor_config.json").write_text(json.dumps(part))
    vision = import_folder(tmp_path / "theirs", tmp_path / "ours").model.vision
    assert vision is not None
    assert (vision.min_pixels, vision.max_pixels) == (784, 50176)
    assert vision.image_mean == (0.5, 0.25, 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_normalize": False}, "do_normalize is false; expected true"),
        ({"do_resize": False}, "do_resize is false; expected true"),
        ({"do_center_crop": True}, "do_center_crop is true; expected false"),
        ({"resample": 2}, "resample is 2; expected 3"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0; expected 1/255"),
        ({"tile_size": 4}, "tile_size .value 4. is a field that megatron-vlm does not know"),
        ({"patch_size": 16}, "patch_size is 16; expected 14, the patch_size of vision_config"),
        ({"merge_size": True}, "merge_size is true; expected a whole number"),
        ({"image_std": [0.5, 0.5]}, "image_std is .0.5, 0.5.; expected 3 numbers"),
        ({**NEWER, "min_pixels": 3136}, "size: shortest_edge is 784; expected 3136, as min_pix"),
        ({"size": {"height": 9}}, "size: height .value 9. is a field"),
        ({"size": 9}, "size is 9; expected an object"),
    ],
)
def test_picture_settings_of_another_kind(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from megatron_vlm.release.importing import import_folder

    _with_settings(tmp_path / "theirs", {"preprocessor_config.json": values})
    with pytest.raises(ConversionError, match=rf"preprocessor_config\.json: {message}"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")


def test_picture_settings_that_disagree(tmp_path: Path) -> None:
    from megatron_vlm.release.importing import import_folder

    files = {
        "preprocessor_config.json": {"min_pixels": 3136},
        "processor_config.json": {"image_processor": NEWER},
    }
    _with_settings(tmp_path / "theirs", files)
    with pytest.raises(ConversionError, match="image_processor: min_pixels is 784; expected 3136"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")


def test_files_of_a_trained_model(tmp_path: Path) -> None:
    """Its own tokenizer's ids."""
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    write_folder(tmp_path / "theirs", "dots1", vocab_size=384)
    imported = import_folder(tmp_path / "theirs", tmp_path / "ours")
    _as_if_trained(imported.checkpoint)
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    ours = Tokenizer.load(tmp_path / "back" / "tokenizer.json")
    assert (config["eos_token_id"], config["pad_token_id"]) == (ours.eos_id, ours.pad_id)
    assert "image_token_id" not in config
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ours.eos_id, ours.special("end")]
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
