"""Rows of a Parquet file, a few at a time, for those who have pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vlm.errors import DataError

_ROWS_AT_ONCE = 32


class ParquetRows:
    """A Parquet file that is open only while it is read."""

    def __init__(self, path: Path) -> None:
        """Read how many rows there are.

        Raises:
            DataError: pyarrow is not installed, or the file is no Parquet.
        """
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError(
                f"{path}: Parquet is read by pyarrow, which is not installed; run "
                "pip install 'megatron-vlm[parquet]', or write the entries as JSON lines"
            ) from error
        self._path = path
        self._parquet = parquet
        # Names that are no text come as ValueError.
        self._faults = (OSError, ValueError, OverflowError, pyarrow.ArrowException)
        self._starts = [0]
        try:
            with parquet.ParquetFile(path) as file:
                metadata = file.metadata
                for group in range(metadata.num_row_groups):
                    self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        except self._faults as error:
            raise self._fault(error) from error

    @property
    def count(self) -> int:
        """Rows."""
        return self._starts[-1]

    def read(self, start: int) -> Iterator[dict[str, Any] | DataError]:
        """Rows from number `start` on, or why one is bad; row groups before it are not read.

        Raises:
            DataError: the file cannot be read any further.
        """
        groups = [i for i, end in enumerate(self._starts[1:]) if end > start]
        if not groups:
            return
        skipped = start - self._starts[groups[0]]
        try:
            with self._parquet.ParquetFile(self._path) as file:
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups):
                    if skipped >= batch.num_rows:
                        skipped -= batch.num_rows
                        continue
                    yield from _rows(batch.slice(skipped))
                    skipped = 0
        except self._faults as error:
            raise self._fault(error) from error

    def _fault(self, error: Exception) -> DataError:
        return DataError(f"{self._path}: cannot be read as Parquet ({_line(error)})")


def _rows(batch: Any) -> list[dict[str, Any] | DataError]:
    try:
        rows: list[dict[str, Any] | DataError] = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        # A text that is not UTF-8, or a date out of range: the other rows may be good.
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]
        return [DataError(f"a value that cannot be read ({_line(error)})")]
    return rows


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
