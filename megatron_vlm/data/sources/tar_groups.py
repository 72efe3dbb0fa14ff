"""Tars whose members form samples by their names, as one numbered sequence of groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_vlm.data.draft import Draft, Entry, Medium, SampleKind
from megatron_vlm.data.sources.byte_ranges import ByteRange, shortened
from megatron_vlm.data.sources.lines import MAX_LINE_BYTES
from megatron_vlm.data.sources.media import MAX_ENCODED_BYTES
from megatron_vlm.data.sources.strict_json import parse_json
from megatron_vlm.data.sources.tar_members import CutOff, Member, tar_members
from megatron_vlm.errors import DataError

MAX_GROUP_MEMBERS = 4096
"""Most members of one sample. Our choice."""

GroupToDrafts = Callable[["Group"], Sequence[Draft]]
"""Turns a group into its samples. Raises DataError with the reason why it cannot."""


@dataclass(slots=True)
class Group:
    """Members that follow each other and whose names agree up to the first dot of the file name."""

    tar: Path
    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """By extension: what follows the first dot, in lower case; in the order of the tar."""
    fault: str = ""
    """Why it cannot be a sample; empty where it can."""

    def add(self, extension: str, member: Member) -> None:
        """Take a member in."""
        if extension in self.members:
            self.fault = f"two members are called {shortened(member.name)}"
        elif len(self.members) >= MAX_GROUP_MEMBERS:
            self.fault = f"more than {MAX_GROUP_MEMBERS} members"
        else:
            self.members[extension] = member

    def medium(self, extension: str) -> Medium:
        """The picture or video with this extension.

        Raises:
            DataError: too large.
        """
        member = self.members[extension]
        name = f"{self.tar.name}/{member.name}"
        if member.size > MAX_ENCODED_BYTES:
            raise DataError(
                f"{shortened(name)}: {member.size} bytes; at most {MAX_ENCODED_BYTES} are read "
                "for one sample"
            )
        return Medium(name, member.size, self._range(member).read)

    def text(self, extension: str) -> str:
        """The member with this extension, as UTF-8 text.

        Raises:
            DataError: unreadable, too long, or not UTF-8.
        """
        encoded = self._small(extension)
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{shortened(self.members[extension].name)}: not UTF-8 at byte {error.start}; "
                "write it again as UTF-8"
            ) from error

    def json(self, extension: str) -> object:
        """The member with this extension, as JSON.

        Raises:
            DataError: unreadable, too long, or not JSON.
        """
        encoded = self._small(extension)
        try:
            return parse_json(encoded)
        except DataError as error:
            raise DataError(f"{shortened(self.members[extension].name)}: {error}") from error

    def _small(self, extension: str) -> bytes:
        member = self.members[extension]
        if member.size > MAX_LINE_BYTES:
            raise DataError(
                f"{shortened(member.name)}: {member.size} bytes; at most {MAX_LINE_BYTES} of text "
                "are read"
            )
        return self._range(member).read()

    def _range(self, member: Member) -> ByteRange:
        name = f"{self.tar.name}/{member.name}"
        return ByteRange(self.tar, member.offset, member.size, shortened(name))


class TarGroupSource:
    """The groups of one or more tars, read as one form: a `draft.Source`."""

    def __init__(
        self,
        kind: SampleKind,
        files: Sequence[Path],
        names: Sequence[str],
        to_drafts: GroupToDrafts,
        excluded: Set[str] = frozenset(),
    ) -> None:
        """Put tars together.

        Args:
            kind: of the samples.
            files: uncompressed tars, in order.
            names: of each, for `origins` and for errors.
            to_drafts: the form; called on worker threads.
            excluded: `NAME/KEY` of groups that are no entries.
        """
        self.kind: SampleKind = kind
        self.origins: Sequence[str] = tuple(names)
        self._files = tuple(files)
        self._to_drafts = to_drafts
        self._excluded = excluded
        self.total: int | None = None
        self._counts: dict[int, int] = {}

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """As `draft.Source.entries`."""
        first = 0
        for origin, path in enumerate(self._files):
            known = self._counts.get(origin)
            if known is not None and first + known <= start:
                first += known
                continue
            number = first
            for group in tar_groups(path):
                if self._excluded and f"{self.origins[origin]}/{group.key}" in self._excluded:
                    continue
                if number >= start:
                    drafts = partial(self._drafts, self.origins[origin], group)
                    yield Entry(number, origin, group.key, drafts)
                number += 1
            self._counts[origin] = number - first
            first = number

    def _drafts(self, name: str, group: Group) -> Sequence[Draft]:
        try:
            if group.fault:
                raise DataError(f"{group.fault}; pack the tar again")
            return self._to_drafts(group)
        except RecursionError as error:
            raise DataError(
                f"{name} {shortened(group.key)}: nested too deeply; flatten it"
            ) from error
        except DataError as error:
            raise DataError(f"{name} {shortened(group.key)}: {error}") from error


def tar_groups(path: Path) -> Iterator[Group]:
    """The groups of a tar, in order.

    A group is complete when the next begins. So the last one before damage, which may have lost
    members, is given only if the damaged member is known to be another's.

    Raises:
        DataError: as `tar_members`.
    """
    group: Group | None = None
    try:
        for member in tar_members(path):
            split = split_name(member.name)
            if split is None:
                continue
            key, extension = split
            if group is not None and group.key != key:
                yield group
                group = None
            group = group or Group(path, key)
            group.add(extension, member)
    except CutOff as cut:
        split = split_name(cut.name)
        if group is not None and split is not None and split[0] != group.key:
            yield group
        raise
    if group is not None:
        yield group


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, as webdataset tells them apart; null for what is no sample:
    a name without an extension, a hidden file, webdataset's own `__...__` records.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or not extension or (name.startswith("__") and name.endswith("__")):
        return None
    return folder + slash + stem, extension.lower()


def extensions_of(group: Group) -> str:
    """What members a group has, for errors."""
    return ", ".join(map(repr, group.members))[:200]
