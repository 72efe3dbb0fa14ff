"""Whether a checkpoint may be loaded: sizes, digests, and no code hidden in its pickled index."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vlm.checkpoint.folder import digest, read_manifest
from megatron_vlm.errors import CheckpointError

# torch.distributed.checkpoint keeps its index (names, shapes, offsets) as a pickle. It is opened
# only if it refers to these and nothing else; none of them runs code of the pickle's choosing.
_MODULES = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
}
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(
        ("torch", name)
        for name in "float64 float32 float16 bfloat16 int64 int32 uint8 bool".split()
    ),
}


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
        CheckpointError: it would import something else, or cannot be read.
    """
    file = path / ".metadata"
    try:
        with open(file, "rb") as stream:
            _CheckedUnpickler(stream, file).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise CheckpointError(
            f"{file}: cannot be read ({error}); the checkpoint is damaged, use another"
        ) from None


class _CheckedUnpickler(pickle.Unpickler):
    """Resolves only names that torch.distributed.checkpoint's index is made of."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """The named class, if a checkpoint may refer to it."""
        if (module, name) in _ALLOWED or (module in _MODULES and "." not in name):
            return super().find_class(module, name)
        raise CheckpointError(
            f"{self._file}: its pickle refers to {module}.{name}, which a checkpoint never needs; "
            "it was not opened"
        )
