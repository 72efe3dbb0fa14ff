"""The pictures of a step, and what of them each rank encodes, as columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class PicturePlan(NamedTuple):
    """One picture of the step: where its features go."""

    document: int
    """Number of its segment within the step."""
    source: int
    """Number of its source."""
    sample: int
    """Number of its sample in the source's data set."""
    ordinal: int
    """Place among the sample's pictures, from 0."""
    grid_h: int
    """Patches along the height."""
    grid_w: int
    """Patches along the width."""
    replica: int
    """Data-parallel replica whose micro-batch holds it."""
    micro_batch: int
    """That micro-batch's place in the step."""
    start: int
    """First of its tokens within the micro-batch's concatenated rows."""
    tokens: int
    """Language tokens, consecutive from `start`."""


@dataclass(frozen=True, slots=True, eq=False)
class PictureTable:
    """Every picture of a step, by row, then by place in the row; each int64 [pictures].

    Columns are `PicturePlan`'s fields; an entry is one.
    """

    document: NDArray[np.int64]
    source: NDArray[np.int64]
    sample: NDArray[np.int64]
    ordinal: NDArray[np.int64]
    grid_h: NDArray[np.int64]
    grid_w: NDArray[np.int64]
    replica: NDArray[np.int64]
    micro_batch: NDArray[np.int64]
    start: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @classmethod
    def of(cls, pictures: list[PicturePlan]) -> PictureTable:
        """A table of some pictures."""
        columns = np.array(pictures, np.int64).reshape(-1, len(PicturePlan._fields)).T
        return cls(*(column.copy() for column in columns))

    @property
    def patches(self) -> NDArray[np.int64]:
        """[pictures] patches of each."""
        return self.grid_h * self.grid_w

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, place: int) -> PicturePlan:
        return PicturePlan(*(int(getattr(self, field.name)[place]) for field in fields(self)))

    def __iter__(self) -> Iterator[PicturePlan]:
        columns = (getattr(self, field.name).tolist() for field in fields(self))
        return map(PicturePlan._make, zip(*columns, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """What every rank encodes: whole pictures, and parts of those that several ranks share.

    By picture, then by place in the picture; each int64 [shares].
    """

    picture: NDArray[np.int64]
    """Place of its picture in the table."""
    rank: NDArray[np.int64]
    """Who encodes it; of a picture that is cut, the ranks ascend."""
    first: NDArray[np.int64]
    """First of the picture's patches, in merge-block order."""
    patches: NDArray[np.int64]
    """Number of patches."""

    @property
    def owner(self) -> NDArray[np.bool_]:
        """[shares] whether this is the picture's first: its rank reads and decodes the picture."""
        return self.first == 0

    def __len__(self) -> int:
        return len(self.picture)
