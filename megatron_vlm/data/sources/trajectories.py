"""Trajectories as JSON: an instruction, then screenshots with the actions taken on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vlm.data.draft import Draft
from megatron_vlm.data.sources.conversations import media_root, objects_of
from megatron_vlm.data.sources.media import FindMedium, MediaFolder, entry_json
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.records import RecordSource, open_records
from megatron_vlm.data.trajectory import parse_trajectory, trajectory_parts


def open_trajectories(path: Path, options: SourceOptions) -> RecordSource:
    """Trajectories from a JSON list, JSON lines or Parquet.

    Args:
        path: a file, or a folder of such files.
        options: `image_root`, `learn_thoughts`, `template`, `thinking`.

    Raises:
        DataError: nothing there, unreadable, or no media root.
    """
    files, names = open_records(path, '{"instruction", "steps": [{"image", "action"}, ...]}')
    folder = MediaFolder.open(media_root(path, options))
    to_drafts = partial(trajectory_drafts, find=folder.find, options=options)
    return RecordSource("trajectory", files, names, to_drafts)


def trajectory_drafts(entry: Any, find: FindMedium, options: SourceOptions) -> Sequence[Draft]:
    """The sample of one entry.

    Args:
        entry: `instruction`, `steps` (`image`, `action`, and a `thought` if there is one), and
            `objects` that grounding marks refer to.
        find: gives its screenshots.
        options: `learn_thoughts`, `template`, `thinking`.

    Raises:
        DataError: the reason why it cannot be a sample; names the field.
    """
    trajectory = parse_trajectory(entry)
    parts = trajectory_parts(
        trajectory,
        objects=objects_of(entry),
        learn_thoughts=options.learn_thoughts,
        template=options.template,
        thinking=options.thinking.mode,
    )
    media = [find(step.image, "image") for step in trajectory.steps]
    return [Draft(tuple(parts), tuple(media), entry_json(entry))]
