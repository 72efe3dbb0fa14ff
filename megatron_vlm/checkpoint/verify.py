"""Whether a checkpoint may be loaded: sizes, digests, and no code hidden in its pickled index."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_vlm.checkpoint.folder import digest, read_manifest
from megatron_vlm.errors import CheckpointError, DamagedCheckpoint

# torch.distributed.checkpoint keeps its index (names, shapes, offsets) as a pickle. It may refer to
# these records, enumerations and types and nothing else: none of them runs code of the pickle's
# choosing, and none leads to something that does.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
        "TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
}
_VALUES = {
    "torch": "Size float64 float32 float16 bfloat16 int64 int32 uint8 bool",
    "torch.serialization": "_get_layout",
}
_ALLOWED = {
    (module, name)
    for names in (_RECORDS, _VALUES)
    for module, listed in names.items()
    for name in listed.split()
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
        try:
            fault = _fault(file, entry, contents and number % shares == share)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault is not None:
            raise DamagedCheckpoint(f"{file}: {fault}; the checkpoint is damaged, use another")


def _fault(file: Path, entry: dict[str, Any], contents: bool) -> str | None:
    if not file.is_file():
        return "missing"
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"{size} bytes, expected {entry['bytes']}"
    if contents and digest(file) != entry["sha256"]:
        return "its content does not match the manifest"
    return None


def verify_index(path: Path) -> None:
    """Refuse a `.metadata` that refers to anything but records of tensors in the manifest's files.

    Raises:
        CheckpointError: it would import something else, lists more than tensors (torch would
            unpickle those), or cannot be read.
    """
    read_index(path)


def read_index(path: Path) -> Metadata:
    """torch's index of a checkpoint, checked as `verify_index` says."""
    file = path / ".metadata"
    try:
        with open(file, "rb") as stream:
            index = _CheckedUnpickler(stream, file).load()
        entries = index.state_dict_metadata
        odd = [name for name, entry in entries.items() if type(entry) is not TensorStorageMetadata]
        places = {place.relative_path for place in index.storage_data.values()}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise DamagedCheckpoint(
            f"{file}: cannot be read ({error}); the checkpoint is damaged, use another"
        ) from None
    if odd:
        raise CheckpointError(
            f"{file}: its entry {odd[0]!r} is no tensor, and a checkpoint holds nothing else; it "
            "was not opened"
        )
    foreign = places - read_manifest(path).keys()
    if foreign:
        raise CheckpointError(
            f"{file}: it refers to {sorted(map(str, foreign))[0]!r}, a file that is not in the "
            "manifest; it was not opened"
        )
    return index


class _CheckedUnpickler(pickle._Unpickler):
    """Builds the records of torch.distributed.checkpoint's index, and nothing else.

    The Python implementation, because C's sets attributes of whatever object a pickle names.
    """

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """The named class, if a checkpoint may refer to it."""
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise CheckpointError(
            f"{self._file}: its pickle refers to {module}.{name}, which a checkpoint never needs; "
            "it was not opened"
        )

    def _build(self) -> None:
        target, state = type(self.stack[-2]), self.stack[-1]  # type: ignore[attr-defined]
        is_record = target.__qualname__ in _RECORDS.get(target.__module__, "").split()
        if not is_record or not (isinstance(state, dict) or hasattr(target, "__setstate__")):
            raise CheckpointError(
                f"{self._file}: its pickle changes a {target.__qualname__}, which a checkpoint "
                "never needs; it was not opened"
            )
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}
