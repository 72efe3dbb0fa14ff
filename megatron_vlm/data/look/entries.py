"""What a sample was in its source: the JSON that lies before its tokens in the shard."""

from __future__ import annotations

import json
import tarfile
from typing import Any

from megatron_vlm.data.format import member_key
from megatron_vlm.data.index import DatasetIndex

_BLOCK = tarfile.BLOCKSIZE
_MOST_BYTES = 1 << 22
"""Beyond so many, an entry is not shown. Our choice."""


def read_entry(index: DatasetIndex, sample: int) -> bytes | None:
    """The JSON kept beside a sample; null if it is not found, or too large to be shown.

    The index does not say where it lies, but the builder writes it right before the tokens, whose
    place is known: its header is looked for from there backwards.
    """
    columns = index.columns
    key = member_key(int(columns.sample_entry[sample]), int(columns.sample_draft[sample]))
    # Where the header of the tokens begins, the JSON and what fills its last block have ended.
    end = int(columns.sample_offset[sample]) - _BLOCK
    path = index.folder / index.shard_names[int(columns.sample_shard[sample])]
    reach = 16 * _BLOCK
    try:
        with path.open("rb") as shard:
            while True:
                start = max(0, end - reach)
                shard.seek(start)
                found = _last_member(shard.read(end - start), f"{key}.json")
                if found is not None or not start or reach >= _MOST_BYTES:
                    return found
                reach *= 8
    except OSError:
        # Told where the tokens are read; the entry only helps to know the sample.
        return None


def entry_id(entry: bytes | None) -> str | None:
    """What the source calls it; null if it does not."""
    if entry is None:
        return None
    try:
        parsed: Any = json.loads(entry)
    except (ValueError, RecursionError):
        return None
    found = parsed.get("id") if isinstance(parsed, dict) else None
    return None if found is None else str(found)


def _last_member(content: bytes, name: str) -> bytes | None:
    """The member of a name that ends where some bytes of a tar end."""
    for start in range(len(content) - _BLOCK, -1, -_BLOCK):
        header = content[start : start + _BLOCK]
        if not header.startswith(name.encode() + b"\0"):
            continue
        try:
            size = tarfile.TarInfo.frombuf(header, "utf-8", "replace").size
        except tarfile.TarError:
            continue
        if -(-size // _BLOCK) * _BLOCK == len(content) - start - _BLOCK:
            return content[start + _BLOCK : start + _BLOCK + size]
    return None
