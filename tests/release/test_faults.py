"""Bad folders: each is one line that names what is wrong, exit code 2, and nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.cli.main import main
from megatron_vlm.errors import ConversionError
from tests.release.folders import CONFIGS, edit_header, read_tensors, write_folder, write_tensors

pytestmark = pytest.mark.unit

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = "model-00002-of-00003.safetensors"


def _refused(folder: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Importing it is refused by the command line, in one line, and leaves nothing."""
    target = folder.parent / "deep" / "ours"
    before = sorted(folder.parent.iterdir())
    assert main(["import", str(folder), str(target)]) == 2
    (line,) = (
        text for text in capsys.readouterr().err.splitlines() if text.startswith("mvlm: error")
    )
    assert re.search(message, line), line
    assert sorted(folder.parent.iterdir()) == before


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Damage that rewrites the tensors."""

    def damage(folder: Path) -> None:
        tensors = read_tensors(folder)
        change(tensors)
        write_tensors(folder, tensors)

    return damage


def _config(**changes: Any) -> Callable[[Path], None]:
    """Damage to config.json; a value of `...` takes the field away."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def _set(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return _tensors(change)


def _poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return make


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_header(folder / SINGLE, change)


TENSORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing expert": (
        _tensors(lambda t: t.pop(GATE)),
        rf"{GATE} is missing, while config.json",
    ),
    "a layer without experts": (
        _tensors(lambda t: [t.pop(name) for name in list(t) if ".2.mlp.experts." in name]),
        r"model\.layers\.2\.mlp\.experts\.0\.gate_proj\.weight is missing \(and 23 more",
    ),
    "an expert too many": (
        _tensors(lambda t: t.update({GATE.replace(".3.", ".8."): t[GATE].clone()})),
        r"experts\.8\.gate_proj\.weight has no place",
    ),
    "a tensor of no model": (
        _tensors(lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(4)})),
        r"sinks has no place",
    ),
    "experts swapped": (
        _config(n_routed_experts=24, moe_intermediate_size=8, n_shared_experts=6),
        r"experts\.8\.\w+_proj\.weight is missing",
    ),
    "fewer experts said": (_config(n_routed_experts=4), r"experts\.\d\.\w+\.weight has no place"),
    "a transposed matrix": (
        _set(GATE, lambda t: t.T),
        rf"{GATE} is \[32, 24\]; expected \[24, 32\]",
    ),
    "a flattened matrix": (_set(GATE, lambda t: t.view(-1)), rf"{GATE} is \[768\]; expected"),
    "integers": (_set(GATE, lambda t: t.to(torch.int8)), rf"{GATE} is I8; expected one of"),
    "truth values": (_set(GATE, lambda t: t > 0), rf"{GATE} is BOOL; expected one of"),
    "float8 without factors": (
        _set(GATE, lambda t: t.to(torch.float8_e4m3fn)),
        "no quantization_config, while tensors are float8",
    ),
    "another float8": (
        _set(GATE, lambda t: t.to(torch.float8_e5m2)),
        rf"{GATE} is F8_E5M2; expected one of",
    ),
    "not a number": (
        _set(GATE, _poke(float("nan"))),
        rf"theirs/{SINGLE}: {GATE} holds NaN; .*another copy",
    ),
    "an infinity": (_set("lm_head.weight", _poke(float("inf"))), "lm_head.weight holds an inf"),
    "minus infinity": (
        _set("model.layers.1.mlp.gate.e_score_correction_bias", _poke(float("-inf"))),
        "correction_bias holds an infinity",
    ),
    "parts of two dtypes": (
        _set(GATE, lambda t: t.float()),
        r"gate_proj\.weight is torch\.\w+, which are one tensor here; give the dtype",
    ),
    "a gap": (
        _header(lambda h: h["model.norm.weight"].update(data_offsets=[0, 64])),
        "a gap or an overlap",
    ),
    "a wrong length": (
        _header(lambda h: h["model.norm.weight"].update(shape=[33])),
        "does not fill its 64 bytes",
    ),
    "a negative place": (
        _header(lambda h: h["model.norm.weight"].update(data_offsets=[-64, 0])),
        "header cannot be read",
    ),
    "no dtype": (_header(lambda h: h["model.norm.weight"].pop("dtype")), "header cannot be read"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_bad_tensors(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "theirs", "dots1")
    damage, message = TENSORS[fault]
    damage(tmp_path / "theirs")
    _refused(tmp_path / "theirs", message, capsys)


def _index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def _cut(share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(content[: int(len(content) * share)])

    return damage


def _repeat(folder: Path) -> None:
    """A second shard with a tensor of the first."""
    first = read_tensors(folder)
    file = folder / "model-00003-of-00003.safetensors"
    from safetensors.torch import load_file, save_file

    part = load_file(file)
    name = json.loads((folder / INDEX).read_text())["weight_map"]
    stolen = next(tensor for tensor, where in name.items() if where == SHARD)
    save_file(part | {stolen: first[stolen]}, file)


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing shard": (lambda f: (f / SHARD).unlink(), rf"{SHARD}: missing, while"),
    "a truncated shard": (_cut(0.7), rf"{SHARD}: \d+ bytes, its header says \d+"),
    "a shard cut in its header": (_cut(0.001), rf"{SHARD}: .* do not hold a header"),
    "an empty shard": (_cut(0.0), rf"{SHARD}: its 0 bytes"),
    "a shard of something else": (
        lambda f: (f / SHARD).write_bytes(b"PK\x03\x04" * 1000),
        rf"{SHARD}: .*do not hold a header",
    ),
    "an index that points nowhere": (
        _index(lambda m: m.update({"lm_head.weight": "model-00009-of-00003.safetensors"})),
        "model-00009-of-00003.safetensors: missing, while",
    ),
    "an index that leads out": (
        _index(lambda m: m.update({"lm_head.weight": "../theirs/model.safetensors"})),
        r"puts lm_head\.weight into '\.\./theirs",
    ),
    "an absolute index": (
        _index(lambda m: m.update({"lm_head.weight": "/etc/passwd"})),
        "into '/etc/passwd'; expected the name",
    ),
    "an index of no text": (_index(lambda m: m.update({"lm_head.weight": 3})), "into '3'"),
    "an index of the wrong shard": (
        _index(lambda m: m.update({"model.embed_tokens.weight": SHARD})),
        rf"model\.embed_tokens\.weight is in {SHARD}, which does not hold it",
    ),
    "an index that forgets": (
        _index(lambda m: m.pop("model.norm.weight")),
        r"does not list model\.norm\.weight",
    ),
    "an index without a map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "an index of no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX}: cannot be read"),
    "a tensor in two shards": (_repeat, "is both in"),
    "two releases in one": (lambda f: (f / SINGLE).write_bytes(b""), "has both"),
    "pickles alone": (
        lambda f: [
            (f / "pytorch_model.bin").write_bytes(b""),
            *[file.unlink() for file in f.glob("model*")],
        ],
        "pytorch_model.bin is a pickle, which is never opened",
    ),
    "shards without their index": (
        lambda f: (f / INDEX).unlink(),
        rf"model-00001-of-00003.safetensors; 3 safetensors in all.*no {INDEX}.*download that",
    ),
    "a folder for the weights": (
        lambda f: [*[file.unlink() for file in f.glob("model*")], (f / SINGLE).mkdir()],
        rf"theirs/{SINGLE}: cannot be read \(Is a directory\)",
    ),
    "a shard of a long name": (
        _index(lambda m: m.update({"lm_head.weight": f"{'m' * 300}.safetensors"})),
        r"theirs/m+\.safetensors: cannot be read \(File name too long\)",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "a configuration of no JSON": (
        lambda f: (f / "config.json").write_text("[1"),
        "config.json: cannot be read",
    ),
    "a list for a configuration": (
        lambda f: (f / "config.json").write_text("[1]"),
        "config.json: holds a list",
    ),
    "a folder for a configuration": (
        lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()],
        r"config.json: cannot be read \(Is a directory\); expected a file that this user may read",
    ),
}


@pytest.mark.parametrize("fault", FILES)
def test_bad_files(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "theirs", "dots1", shards=3)
    damage, message = FILES[fault]
    damage(tmp_path / "theirs")
    _refused(tmp_path / "theirs", message, capsys)


def test_folders_that_are_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_vlm.release.importing import import_folder

    theirs, run = tmp_path / "theirs", tmp_path / "run"
    write_folder(theirs, "dots1")
    import_folder(theirs, run / "checkpoints")
    for ours in (run, run / "checkpoints", run / "checkpoints" / "iter_0000000"):
        _refused(ours, f"{ours}: is a checkpoint or a run .* mvlm export {ours} HF_DIR", capsys)
    released = tmp_path / "releases" / "one"
    write_folder(released, "dots1")
    (released.parent / "collection.json").write_text("{}")
    _refused(released.parent, f"is a folder of releases; .*for example {released}$", capsys)
    assert main(["export", str(theirs), str(tmp_path / "hf")]) == 2
    assert f"{theirs}: is a Hugging Face folder; " in capsys.readouterr().err


FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another model": ("dots1", {"model_type": "llama"}, "model_type is 'llama'; expected one of"),
    "another class": (
        "dots1",
        {"architectures": ["Dots1ForSequenceClassification"]},
        "architectures is",
    ),
    "an unknown field": ("dots1", {"attn_sink": True}, "attn_sink .* does not know"),
    "a missing field": ("dots1", {"hidden_size": ...}, "hidden_size is missing"),
    "text for a number": ("dots1", {"hidden_size": "32"}, 'hidden_size is "32"; expected a whole'),
    "true for a number": ("dots1", {"hidden_size": True}, "hidden_size is true"),
    "a sliding window": (
        "dots1",
        {"sliding_window": 128, "max_window_layers": 1},
        "sliding_window is 128",
    ),
    "sliding layers": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types is",
    ),
    "a window that is used": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 0},
        "sliding_window is",
    ),
    "weights not normalised": (
        "dots1",
        {"norm_topk_prob": False},
        "norm_topk_prob is false; expected true: .*by their sum",
    ),
    "biases": ("dots1", {"attention_bias": True}, "attention_bias is true; expected false"),
    "no biases": ("dots_ocr", {"attention_bias": False}, "attention_bias is false"),
    "another activation": (
        "qwen2",
        {"hidden_act": "gelu"},
        'hidden_act is "gelu"; expected "silu"',
    ),
    "dropout": ("qwen2", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    "softmax scores": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is"),
    "greedy choice": ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is"),
    "experts in every other layer": ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    "another epsilon": ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
    "two predictions": ("deepseek_v3", {"num_nextn_predict_layers": 2}, "predict_layers is 2"),
    "no groups": ("deepseek_v3", {"n_group": ...}, "n_group is missing"),
    "uneven groups": ("deepseek_v3", {"n_group": 3}, "moe_router_num_groups 3 must divide"),
    "another rope": (
        "dots1",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        'rope_type is "dynamic"',
    ),
    "a factor of attention": (
        "deepseek_v3",
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.5,
            }
        },
        "rope_scaling: attention_factor is 1.5",
    ),
    "a part rotated": ("dots1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "no base": ("dots1", {"rope_theta": ...}, "rope_theta is missing"),
    "quantised otherwise": (
        "qwen2",
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantization_config is .*awq",
    ),
}


@pytest.mark.parametrize("fault", FIELDS)
def test_bad_fields(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, changes, message = FIELDS[fault]
    write_folder(tmp_path / "theirs", name)
    _config(**changes)(tmp_path / "theirs")
    _refused(tmp_path / "theirs", message, capsys)


VISION: dict[str, tuple[Any, str]] = {
    "is_causal": (True, "is_causal is true"),
    "use_bias": (True, "use_bias is true"),
    "post_norm": (False, "post_norm is false"),
    "temporal_patch_size": (2, "temporal_patch_size is 2"),
    "hidden_size": (64, "hidden_size is 64; expected 32"),
    "num_experts": (4, "num_experts .* does not know"),
}


@pytest.mark.parametrize("field", VISION)
def test_bad_encoder_fields(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "theirs", "dots_ocr")
    value, message = VISION[field]
    vision = CONFIGS["dots_ocr"]["vision_config"] | {field: value}
    _config(vision_config=vision)(tmp_path / "theirs")
    _refused(tmp_path / "theirs", f"vision_config: {message}", capsys)


def test_another_preprocessor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "theirs", "dots_ocr")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text('{"patch_size": 16}')
    _refused(tmp_path / "theirs", "patch_size is 16; expected 14", capsys)


def test_prediction_that_transformers_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "theirs", "deepseek_v3")
    damage = _tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith(LAYER)])
    damage(tmp_path / "theirs")
    _refused(tmp_path / "theirs", "set num_nextn_predict_layers to 0", capsys)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dots1", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, which takes"),
        ("dots1", {"n_routed_experts": 10**9}, "n_routed_experts is 1000000000, which takes"),
        (
            "dots1",
            {"num_attention_heads": 10**9, "num_key_value_heads": 10**9, "head_dim": 2},
            "num_attention_heads is 1000000000, which takes",
        ),
        (
            "dots_ocr",
            {"vision_config": CONFIGS["dots_ocr"]["vision_config"] | {"num_hidden_layers": 10**9}},
            "vision_config: num_hidden_layers is 1000000000, which takes",
        ),
    ],
)
def test_counts_that_no_file_has_room_for(
    name: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused before anything is made for each of them, in less time than one can measure."""
    write_folder(tmp_path / "theirs", name)
    _config(**changes)(tmp_path / "theirs")
    _refused(tmp_path / "theirs", message, capsys)


LAYER = "model.layers.3."


@pytest.mark.parametrize(
    ("name", "copy", "of"),
    [
        ("deepseek_v3", f"{LAYER}embed_tokens.weight", "model.embed_tokens.weight"),
        ("deepseek_v3", f"{LAYER}shared_head.head.weight", "lm_head.weight"),
        ("qwen2_tied", "lm_head.weight", "model.embed_tokens.weight"),
    ],
)
def test_copies_that_differ(
    name: str, copy: str, of: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "theirs", name)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[copy] = tensors[of].clone()
        tensors[copy].view(-1)[-1] += 1

    _tensors(change)(tmp_path / "theirs")
    _refused(tmp_path / "theirs", f"{copy} differs from {of}", capsys)


def test_copies_may_be_absent(tmp_path: Path) -> None:
    from megatron_vlm.release.importing import import_folder

    write_folder(tmp_path / "theirs", "deepseek_v3")
    drop = (f"{LAYER}embed_tokens.weight", f"{LAYER}shared_head.head.weight")
    _tensors(lambda t: [t.pop(name) for name in drop])(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")


def test_targets_that_are_not_ours(tmp_path: Path) -> None:
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    theirs, ours, release = (tmp_path / name for name in ("theirs", "ours", "release"))
    write_folder(theirs, "dots1")
    import_folder(theirs, ours)
    export_checkpoint(ours, release)
    with pytest.raises(ConversionError, match="imported checkpoint already.*--overwrite"):
        import_folder(theirs, ours)
    with pytest.raises(ConversionError, match="export already.*--overwrite"):
        export_checkpoint(ours, release)
    import_folder(theirs, ours, overwrite=True)
    export_checkpoint(ours, release, overwrite=True, dtype="float32")
    assert {t.dtype for t in read_tensors(release).values()} == {torch.float32}
    for place, write in ((ours, import_folder), (release, export_checkpoint)):
        (place / "notes.txt").write_text("mine")
        with pytest.raises(ConversionError, match="holds notes.txt"):
            write(theirs if place is ours else ours, place, overwrite=True)
        assert (place / "notes.txt").read_text() == "mine"
    with pytest.raises(ConversionError, match="did not write"):
        export_checkpoint(ours, theirs, overwrite=True)
    with pytest.raises(ConversionError, match="did not write"):
        import_folder(theirs, theirs, overwrite=True)
    with pytest.raises(ConversionError, match="is a file"):
        export_checkpoint(ours, theirs / "config.json")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
