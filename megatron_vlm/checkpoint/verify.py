"""Whether a checkpoint may be loaded: sizes, digests, and no code hidden in its pickled index."""

from __future__ import annotations

import pickletools
from pathlib import Path

from megatron_vlm.checkpoint.folder import digest, read_manifest
from megatron_vlm.errors import CheckpointError

# torch.distributed.checkpoint keeps its index (names, shapes, offsets) as a pickle. It is opened
# only if it refers to these and nothing else.
_ALLOWED_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
    "torch.distributed._shard",
    "torch.serialization",
)
_ALLOWED_NAMES = {
    ("torch", "Size"),
    ("torch", "dtype"),
    ("torch", "device"),
    ("torch", "memory_format"),
    ("torch", "strided"),
    ("torch._utils", "_rebuild_tensor"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("builtins", "getattr"),
}
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"}


def verify_files(path: Path, share: int = 0, shares: int = 1, contents: bool = True) -> None:
    """Check every file's size, and the digests of this share of them.

    Args:
        path: the checkpoint.
        share: which share of the files to digest; ranks divide them among themselves.
        shares: how many shares there are.
        contents: whether to compare digests at all.

    Raises:
        CheckpointError: a file is missing, truncated, or its content has changed.
    """
    for number, (name, entry) in enumerate(sorted(read_manifest(path).items())):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; the checkpoint is damaged, use another")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{file}: {size} bytes, expected {entry['bytes']}; the checkpoint is damaged, "
                "use another"
            )
        if contents and number % shares == share and digest(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file}: its content does not match the manifest; the checkpoint is damaged, "
                "use another"
            )


def verify_index(path: Path) -> None:
    """Refuse a `.metadata` whose pickle refers to anything but checkpoint classes.

    Raises:
        CheckpointError: it would import something else.
    """
    file = path / ".metadata"
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(file.read_bytes()):
            if isinstance(argument, str) and "UNICODE" in opcode.name:
                strings.append(argument)
            elif opcode.name == "GLOBAL":
                _check_global(file, *str(argument).split(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                _check_global(file, *_last_names(strings))
            elif opcode.name in ("INST", "EXT1", "EXT2", "EXT4"):
                raise CheckpointError(f"{file}: pickle opcode {opcode.name} is not accepted")
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); the checkpoint is damaged, use another"
        ) from None


def _last_names(strings: list[str]) -> tuple[str, str]:
    return (strings[-2], strings[-1]) if len(strings) > 1 else ("?", "?")


def _check_global(file: Path, module: str, name: str) -> None:
    allowed = (
        module.startswith(_ALLOWED_MODULES)
        or (module, name) in _ALLOWED_NAMES
        or (module == "torch" and name in _DTYPES)
    )
    if not allowed:
        raise CheckpointError(
            f"{file}: its pickle refers to {module}.{name}, which a checkpoint never needs; "
            "it was not opened"
        )
