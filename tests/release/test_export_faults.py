"""Bad checkpoints and disks: one line, and nothing written; damage drawn at random, too."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.checkpoint.folder import digest, find_checkpoint
from megatron_vlm.errors import ConversionError, UserError
from tests.release.folders import assert_identical, read_tensors, write_folder

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`theirs`, and `ours` made of it."""
    from megatron_vlm.release.importing import import_folder

    folder = tmp_path_factory.mktemp("imported")
    write_folder(folder / "theirs", "dots1", shards=2)
    import_folder(folder / "theirs", folder / "ours", file_bytes=50_000)
    return folder


@pytest.fixture
def place(imported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(imported, tmp_path / "place"))


def _export(place: Path, **options: Any) -> None:
    from megatron_vlm.release.exporting import export_checkpoint

    export_checkpoint(place / "ours", place / "deep" / "back", **options)


def _left(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()} - {"theirs", "ours"}


def _sign(checkpoint: Path, name: str) -> None:
    """Let the manifest say what a file has become."""
    file = checkpoint / name
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def _edit_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        state = json.loads((checkpoint / "state.json").read_text())
        change(state)
        (checkpoint / "state.json").write_text(json.dumps(state))
        _sign(checkpoint, "state.json")

    return damage


def _flip(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(checkpoint: Path) -> None:
    file = checkpoint / "__0_1.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def _unfinite(checkpoint: Path) -> None:
    """An infinity in the embedding, which the first file begins with."""
    file = checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    values = read_tensors(checkpoint.parent.parent / "theirs")["model.embed_tokens.weight"]
    first = values.view(torch.uint8).numpy().tobytes()[:64]
    start = content.index(first)
    content[start : start + 2] = b"\x80\x7f"
    file.write_bytes(content)
    _sign(checkpoint, file.name)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (_flip, "does not match the manifest"),
    "truncated": (_truncate, r"__0_1\.distcp: \d+ bytes, expected"),
    "an infinity": (_unfinite, r"embed_tokens\.weight\) holds an infinity"),
    "a layer fewer said": (
        _edit_state(lambda s: s["model"]["language"].update(num_layers=2)),
        r"decoder\.layers\.2\.\S+ is no tensor of the model",
    ),
    "a layer more said": (
        _edit_state(lambda s: s["model"]["language"].update(num_layers=4)),
        r"decoder\.layers\.3\.\S+ is missing",
    ),
    "another width said": (
        _edit_state(lambda s: s["model"]["language"].update(ffn_hidden_size=64)),
        r"linear_fc1\.weight is torch\.bfloat16 \[96, 32\]; expected numbers \[128, 32\]",
    ),
    "no model": (_edit_state(lambda s: s.pop("model")), "model is missing"),
    "no sizes": (_edit_state(lambda s: s["model"].pop("language")), "does not describe a model"),
    "a trait no family has": (
        _edit_state(lambda s: s["model"]["language"].update(qk_layernorm=False)),
        "no Hugging Face family has this model: .*qk_layernorm is false",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_checkpoints(damage: str, place: Path) -> None:
    change, message = DAMAGE[damage]
    change(place / "ours" / "iter_0000000")
    with pytest.raises(UserError, match=message) as caught:
        _export(place)
    assert "\n" not in str(caught.value)
    assert not _left(place)


@pytest.mark.parametrize("which", ["import", "export"])
def test_a_full_disk(which: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.release.importing import import_folder

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConversionError, match="No space left.*nothing was left behind"):
        if which == "import":
            import_folder(place / "theirs", place / "deep" / "ours")
        else:
            _export(place)
    assert not _left(place)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, r"No space left on device; \d+ MiB are free there\); make room or name"),
        (errno.EACCES, r"Permission denied\); name a folder below one that this user may write"),
        (errno.ENOENT, r"No such file or directory\); name another folder; nothing"),
    ],
)
def test_advice_suits_what_the_disk_said(number: int, said: str, tmp_path: Path) -> None:
    from megatron_vlm.release.placing import disk_errors

    with pytest.raises(ConversionError, match=said), disk_errors(tmp_path / "out"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("which", ["import", "export"])
def test_a_disk_that_does_not_give_back(
    which: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names what could not be read, not what was to be written."""
    from megatron_vlm.release.importing import import_folder

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    source = "theirs/model" if which == "import" else "ours/iter_0000000/__0_0"
    with pytest.raises(UserError, match=f"{source}.*cannot be read at byte .*Input/output error"):
        if which == "import":
            import_folder(place / "theirs", place / "deep" / "ours")
        else:
            _export(place)
    assert not _left(place)


@pytest.mark.parametrize("which", ["import", "export"])
def test_an_interruption(which: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.release import exporting, importing

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "check_finite", interrupt)
    monkeypatch.setattr(importing, "check_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        if which == "import":
            importing.import_folder(place / "theirs", place / "deep" / "ours")
        else:
            _export(place)
    assert not _left(place)


def test_what_a_killed_export_left_is_cleared(place: Path) -> None:
    (place / "deep" / ".back.incomplete").mkdir(parents=True)
    (place / "deep" / ".back.incomplete" / "part").write_text("half")
    _export(place)
    assert [path.name for path in (place / "deep").iterdir()] == ["back"]


def _damage(content: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, taken away or put in."""
    result = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        spot = draw.randrange(len(result))
        kind = draw.randrange(4)
        if kind == 0:
            result[spot] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del result[spot : spot + draw.randint(1, 9)]
        elif kind == 2:
            result[spot:spot] = draw.randbytes(draw.randint(1, 9))
        else:
            result[spot : spot + 4] = result[: draw.randint(0, 4)]
    return bytes(result)


def _another_digit(content: bytes, draw: random.Random) -> bytes:
    """One digit changed: what is still read as the same kind of file."""
    result = bytearray(content)
    spot = draw.choice([place for place, byte in enumerate(content) if chr(byte).isdigit()])
    result[spot] = ord(draw.choice("123456789"))
    return bytes(result)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_folders_never_pass_unnoticed(seed: int, place: Path) -> None:
    """Damage to a header, the index or config.json is one line."""
    from megatron_vlm.release.importing import import_folder

    draw = random.Random(seed)
    name = draw.choice(["model-00001-of-00002.safetensors", INDEX, "config.json"])
    file = place / "theirs" / name
    content = file.read_bytes()
    if name.endswith(".safetensors"):
        length = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(_damage(content[:length], draw) + content[length:])
    else:
        file.write_bytes(_damage(content, draw))
    with pytest.raises(UserError) as error:
        import_folder(place / "theirs", place / "deep" / "ours")
    assert "\n" not in str(error.value)
    assert not _left(place)


def test_other_numbers_in_a_config(place: Path, tmp_path: Path) -> None:
    """A size is refused; what no tensor tells, an epsilon say, is believed and harms no tensor."""
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    file = place / "theirs" / "config.json"
    content, tensors = file.read_bytes(), read_tensors(place / "theirs")
    refused = through = 0
    for seed in range(40):
        changed = _another_digit(content, random.Random(seed))
        file.write_bytes(changed)
        ours, back = (tmp_path / str(seed) / name for name in ("ours", "back"))
        try:
            import_folder(place / "theirs", ours)
        except UserError as error:
            assert "\n" not in str(error)
            assert not ours.parent.exists()
            refused += 1
            continue
        export_checkpoint(ours, back)
        assert_identical(read_tensors(back), tensors)
        said, written = json.loads(changed), json.loads((back / "config.json").read_text())
        assert {field: written[field] for field in said} == said
        through += 1
    assert refused > 5 and through > 5


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("seed", range(40))
def test_damaged_checkpoints_never_pass_unnoticed(seed: int, place: Path) -> None:
    """Even with a manifest that agrees with the damage."""
    draw = random.Random(seed)
    checkpoint = find_checkpoint(place / "ours")
    name = draw.choice([".metadata", "state.json", "__0_0.distcp"])
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(_damage(content, draw))
    _sign(checkpoint, name)
    try:
        _export(place)
    except UserError as error:
        assert "\n" not in str(error)
        assert not _left(place)
        return
    if name == ".metadata":
        # Damage where nothing is said, in names of folders or hints.
        assert_identical(read_tensors(place / "deep" / "back"), read_tensors(place / "theirs"))
