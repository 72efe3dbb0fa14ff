"""Builds a data set from any source: checks everything once, so that training need not.

Media are decoded in full and bad samples are listed with the reason. All files are written aside,
where a build that was ended goes on when it is run again; the rename of `dataset.json` alone puts
the new set in the place of the old one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_vlm.data.build_progress import BuildProgress
from megatron_vlm.data.build_publish import complete_files, published_files, switch
from megatron_vlm.data.build_state import BuildState, only_one, sign
from megatron_vlm.data.chat import ThinkingSettings
from megatron_vlm.data.chat_template import ChatTemplate
from megatron_vlm.data.draft import SampleKind, Source
from megatron_vlm.data.encode import (
    EncodeSettings,
    encode_entry,
)
from megatron_vlm.data.format import (
    DATASET_FILE,
    DEFAULT_SHARD_MB,
    DEFAULT_VIDEO_FPS,
    DEFAULT_VIDEO_TOKENS,
    REJECTED_FILE,
    build_folders,
    current_build,
    temporary_path,
)
from megatron_vlm.data.geometry import PictureRule
from megatron_vlm.data.ordered import map_ordered, usable_cores
from megatron_vlm.data.shards import ShardRecord, ShardWriter
from megatron_vlm.data.sources.opening import open_source
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import Tokenizer, byte_tokenizer, sha256
from megatron_vlm.data.video import LEVELS
from megatron_vlm.errors import DataError

_MAX_PENDING_BYTES = 2**30
"""Encoded media held in memory at once, beyond those of the entry being written. Our choice."""

_MEGABYTE = 2**20
_SHOWN_REJECTIONS = 3


@dataclass(frozen=True, slots=True)
class BuildSummary:
    """What a build wrote."""

    folder: Path
    """Subfolder that holds every file but `dataset.json`."""
    kind: SampleKind
    samples: int
    pictures: int
    """Pictures and frames of videos."""
    text_tokens: int
    """One for each picture included."""
    loss_tokens: int
    shards: int
    rejected: int
    """Samples and entries that were left out."""
    first_rejected: tuple[Mapping[str, Any], ...]
    """Some of them, as `rejected.jsonl` has them: `entry`, `draft`, `id`, `origin`, `reason`."""


def build_dataset(
    source: Path,
    out: Path,
    *,
    form: str = "auto",
    options: SourceOptions | None = None,
    tokenizer: Tokenizer | None = None,
    template: TemplateText | None = None,
    image_root: Path | None = None,
    seen: PictureRule | None = None,
    count_points: bool = False,
    video_fps: float = DEFAULT_VIDEO_FPS,
    video_max_tokens: int = DEFAULT_VIDEO_TOKENS,
    shard_mb: int = DEFAULT_SHARD_MB,
    overwrite: bool = False,
    workers: int | None = None,
    show_progress: bool = False,
    inputs: Sequence[Path] = (),
) -> BuildSummary:
    """Build a data set.

    The same input gives the same bytes. An older data set in `out` stays whole, and is what a
    reader finds, until the new one is complete; then it is removed. A build that was ended early,
    however that happened, goes on after its last complete shard when it is called again alike.

    Args:
        source: a file, a folder, or a pattern of tars.
        out: folder to write; made if missing.
        form: a key of `sources.opening.FORMS`, or `auto`.
        options: how the source is read; its tokenizer and its template are those of the set.
        tokenizer: null makes the byte-level one.
        template: what dialogues are written by; null: the built-in format.
        image_root: instead of that of `options`.
        seen: how the model resizes pictures: coordinates are written in pixels of the result; null:
            in thousandths of a picture's sides.
        count_points: counts list their objects' points before the number.
        video_fps: frames a second taken from videos that name none.
        video_max_tokens: most language tokens of a video.
        shard_mb: megabytes after which a new shard begins.
        overwrite: replace a data set in `out`.
        workers: threads that read and decode; null: one per core that this process may use.
        show_progress: tell on standard error how far it is.
        inputs: other files that the caller has read, which replacing must not remove.

    Raises:
        DataError: the source, the tokenizer, the template or the folder is unfit, the source holds
            no dialogues for the template, every sample is bad, memory runs out, or the disk
            refuses.
    """
    _check_numbers(shard_mb, workers, video_fps, video_max_tokens)
    tokenizer = tokenizer or byte_tokenizer()
    options = replace(options or SourceOptions(), tokenizer=tokenizer, template=None)
    if template is not None:
        options = replace(options, template=_checked(template, tokenizer, options))
    if image_root is not None:
        options = replace(options, image_root=image_root)
    progress = BuildProgress(show_progress)
    said: list[str] = []
    opened = open_source(source, form, options, said.append)
    if template is not None and opened.kind == "document":
        raise DataError(
            f"{source}: holds documents, which have no turns that {template.name} could write; "
            "leave out --chat-template"
        )
    build = _Build(
        source=source,
        opened=opened,
        out=out,
        settings=EncodeSettings(
            tokenizer, seen, count_points, video_fps, video_max_tokens, template
        ),
        shard_bytes=shard_mb * _MEGABYTE,
        threads=workers or usable_cores(),
        progress=progress,
    )
    try:
        signature = sign(source, out, _signed(form, options, build))
        published = BuildState(out).published(signature)
        _check_target(out, overwrite, published)
        known = [text.to_json().encode() for text in (tokenizer, template) if text is not None]
        _check_inputs(out, source, inputs, known)
        out.mkdir(parents=True, exist_ok=True)
        for line in said:
            progress.tell(line)
        with only_one(out):
            return build.run(signature)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: cannot be written ({error.strerror}); choose another "
            "folder or make room"
        ) from error


@dataclass(frozen=True, slots=True)
class _Build:
    source: Path
    opened: Source
    out: Path
    settings: EncodeSettings
    shard_bytes: int
    threads: int
    progress: BuildProgress

    def run(self, signature: str) -> BuildSummary:
        state = BuildState(self.out)
        record = state.published(signature)
        if record is None or not published_files(self.out, record):
            record = self._write(state, signature)
        else:
            self.progress.tell(f"{self.out}: every shard is complete; going on from there")
        switch(self.out, record)
        return _summary(self.out, record)

    def _write(self, state: BuildState, signature: str) -> dict[str, Any]:
        """Write all files, whatever part of them is there; returns what `dataset.json` holds."""
        complete = state.begin(signature)
        if complete:
            samples = sum(record.samples for record in complete)
            self.progress.tell(
                f"{self.out}: {len(complete):,} shards of {samples:,} samples are complete; going "
                f"on at entry {complete[-1].next_entry:,}"
            )
        writer = ShardWriter(state.folder, self.shard_bytes, self.opened.origins, complete)
        try:
            self._add_entries(writer, complete)
            shards, tail = writer.finish()
            self._check_shards(shards, tail)
            record = complete_files(state.folder, self.opened, self.settings, shards, tail)
            state.publish(record)
            return record
        except BaseException:
            writer.abort()
            # What went wrong is told, whatever the disk says to this.
            with suppress(OSError):
                if kept := state.give_up():
                    self.progress.tell(
                        f"{self.out}: {kept:,} complete shards stay; the same command goes on there"
                    )
            raise

    def _add_entries(self, writer: ShardWriter, complete: Sequence[ShardRecord]) -> None:
        start = complete[-1].next_entry if complete else 0
        encode = partial(encode_entry, kind=self.opened.kind, settings=self.settings)
        entries = self.opened.entries(start)
        results = map_ordered(encode, entries, self.threads, _MAX_PENDING_BYTES)
        with closing(results), self.progress.start(start, self.opened.total) as progress:
            for result in results:
                writer.add(result)
                progress.advance(writer.bytes_written)

    def _check_shards(self, shards: Sequence[ShardRecord], tail: Path) -> None:
        """Raises DataError if there is no sample."""
        if shards:
            return
        with tail.open("rb") as file:
            first = file.readline()
            count = bool(first) + sum(1 for _ in file)
        if not count:
            raise DataError(f"{self.source}: holds no entries; expected at least one sample")
        reason = json.loads(first)["reason"]
        raise DataError(f"{self.source}: all {count:,} samples are bad; the first: {reason}")


def _check_numbers(
    shard_mb: int, workers: int | None, video_fps: float, video_max_tokens: int
) -> None:
    if shard_mb < 1:
        raise DataError(f"shard size {shard_mb} MB: expected at least 1")
    if workers is not None and workers < 1:
        raise DataError(f"workers {workers}: expected at least 1")
    if not 0 < video_fps < float("inf"):
        raise DataError(f"video fps {video_fps}: expected more than 0 frames a second")
    if video_max_tokens < min(LEVELS):
        raise DataError(
            f"video tokens {video_max_tokens}: expected at least the {min(LEVELS)} of one frame"
        )


def _checked(template: TemplateText, tokenizer: Tokenizer, options: SourceOptions) -> ChatTemplate:
    """The template with the set's tokenizer, once it is known to serve."""
    found = ChatTemplate(template, tokenizer)
    found.check(options.thinking.mode)
    prompts = {options.thinking.prompt(thinks) for thinks in (True, False)}
    if prompts != {ThinkingSettings().prompt(thinks) for thinks in (True, False)}:
        raise DataError(
            "--thinking-prompt and --plain-prompt are of the built-in format; a chat template "
            "toggles thinking by itself: leave them out"
        )
    return found


def _signed(form: str, options: SourceOptions, build: _Build) -> dict[str, Any]:
    """The settings that decide what is written, as plain values."""
    settings = build.settings
    rule = settings.seen
    return {
        "form": form,
        "options": {
            item.name: str(getattr(options, item.name))
            for item in fields(options)
            if item.name not in ("tokenizer", "template")
        },
        "tokenizer": sha256(settings.tokenizer.to_json().encode()),
        "template": settings.template and settings.template.sha256,
        "seen": rule
        and (rule.patch_size * rule.spatial_merge_size, rule.min_pixels, rule.max_pixels),
        "count_points": settings.count_points,
        "video": (settings.video_fps, settings.video_max_tokens),
        "shard_bytes": build.shard_bytes,
    }


def _summary(out: Path, record: Mapping[str, Any]) -> BuildSummary:
    folder = out / str(record["folder"])
    with (folder / REJECTED_FILE).open("rb") as file:
        first = tuple(json.loads(line) for line in islice(file, _SHOWN_REJECTIONS))
    return BuildSummary(
        folder=folder,
        kind=record["kind"],
        samples=record["samples"],
        pictures=record["pictures"],
        text_tokens=record["text_tokens"],
        loss_tokens=record["loss_tokens"],
        shards=len(record["shards"]),
        rejected=record["rejected"],
        first_rejected=first,
    )


def _check_target(out: Path, overwrite: bool, published: Mapping[str, Any] | None) -> None:
    """Raises DataError unless `out` is free, or holds only what a build may replace."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; expected a folder to write into")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    current = current_build(out)
    leftovers = {temporary_path(out / DATASET_FILE).name, *(p.name for p in build_folders(out))}
    if current is None and not names <= leftovers:
        raise DataError(
            f"{out}: is not empty and holds no data set; choose another folder or empty it"
        )
    # A build that was killed once its set was in place has only to clear away.
    ours = published is not None and published.get("folder") == current
    if current is not None and not overwrite and not ours:
        raise DataError(f"{out}: holds a data set; choose another folder or add --overwrite")


def _check_inputs(out: Path, source: Path, inputs: Sequence[Path], known: Sequence[bytes]) -> None:
    """Raises DataError if replacing what `out` holds would remove a file that is being read, or the
    source would hold what is written."""
    target = out.resolve()
    if source.is_dir() and target.is_relative_to(source.resolve()):
        raise DataError(f"{out}: lies inside the source {source}; choose a folder outside of it")
    if not out.is_dir():
        return
    doomed = (target / DATASET_FILE, *(path.resolve() for path in build_folders(out)))
    for given in (source, *inputs):
        path = given.resolve()
        if not any(path.is_relative_to(place) for place in doomed):
            continue
        # The set's own tokenizer and template may serve again: the new set holds the same bytes.
        if not path.is_file() or path.read_bytes() not in known:
            raise DataError(
                f"{given}: lies among the files that replacing {out} removes; move it, or choose "
                "another folder"
            )
