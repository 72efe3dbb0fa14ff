"""`mvlm release`: choose, look at what is there, make what is not, index, push.

Each release is written hidden beside its place, verified there, and renamed when all of it is on
the disk. So a command that ends at any moment leaves whole releases alone, and running it again
makes the rest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import megatron_vlm
from megatron_vlm.config import dump_yaml, load_recipe
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.models.language.engine_config import parameter_dtype
from megatron_vlm.release import curve, release_folder
from megatron_vlm.release.card import (
    AS_TRAINED,
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    STATE_FILE,
    SUMS_FILE,
    model_card,
)
from megatron_vlm.release.card import FILE as CARD
from megatron_vlm.release.choosing import Candidate, Choice, choose, describe_missing
from megatron_vlm.release.collection import (
    STATE_FORMAT,
    check_free,
    collection_files,
    read_release,
    releases,
    write_collection,
)
from megatron_vlm.release.exporting import ExportSummary, export_checkpoint
from megatron_vlm.release.facts import training_facts, with_short_paths
from megatron_vlm.release.history import History, read_history
from megatron_vlm.release.placing import disk_errors, draft, held
from megatron_vlm.release.pushing import PushTarget, push_target
from megatron_vlm.release.safetensors_reader import read_errors
from megatron_vlm.release.safetensors_writer import SHARD_BYTES
from megatron_vlm.release.targets import MARKER
from megatron_vlm.release.verification import check_installed, verify
from megatron_vlm.release.words import bytes_in_words, count_in_words


@dataclass(frozen=True)
class Options:
    """What decides the content of a release, besides its checkpoint."""

    dtype: str = "keep"
    max_shard_bytes: int = SHARD_BYTES
    with_optimizer: bool = False
    verify: bool = True
    licence: str | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class Request:
    """One command."""

    run_dir: Path
    out_dir: Path
    every_tokens: int | None = None
    iterations: Sequence[int] | None = None
    name: str | None = None
    """Null: the model's."""
    options: Options = Options()
    overwrite: bool = False
    verify_existing: bool = False
    push: str | None = None
    show_progress: bool = False


@dataclass
class Report:
    """What a command did."""

    made: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    pushed: list[str] = field(default_factory=list)
    missing: list[tuple[int, int]] = field(default_factory=list)
    """First and last token count of each range of multiples without a checkpoint."""


@dataclass(frozen=True)
class _Planned:
    candidate: Candidate
    name: str
    target: Path
    manifest_sha256: str
    there: bool
    """Whether it lies there as wanted."""

    @property
    def revision(self) -> str:
        """The release's name without the model's."""
        return self.target.name.removeprefix(f"{self.name}-")


def release_run(request: Request, say: Callable[[str], None]) -> Report:
    """Release checkpoints of a run.

    Args:
        request: which, and how.
        say: told, in a line each, what is done and what is not.

    Raises:
        UserError: the request cannot be carried out; nothing was begun, unless a checkpoint turns
            out to be damaged.
        VerificationError: a release does not compute what its checkpoint does; it is not there,
            those before it are.
        PushError: all releases are there, but not all of them where they should be sent.
    """
    base = request.options.base_model
    if base is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base, re.ASCII):
        raise ConfigError(f"--base-model {base}: expected OWNER/NAME, as the hub names it")
    target = push_target(request.push) if request.push is not None else None
    if request.options.verify:
        check_installed()
    with read_errors(request.run_dir):
        choice = choose(request.run_dir, request.every_tokens, request.iterations)
    for line in describe_missing(choice, request.every_tokens or 1):
        say(line)
    if choice.next_multiple is not None:
        say(f"{count_in_words(choice.next_multiple)} tokens: not reached yet")
    check_free(request.out_dir)
    report = Report(missing=choice.missing)
    with _output(request.out_dir):
        with read_errors(request.out_dir):
            planned = _plan(request, choice)
            history = read_history(request.run_dir)
        if history.unreadable:
            say(f"{request.run_dir / 'metrics.jsonl'}: {history.unreadable} lines are no metrics")
        for each in planned:
            if each.there:
                say(f"{each.target}: is there already, of the same checkpoint and options")
                report.skipped.append(each.target.name)
                continue
            facts = _make(request, each, history, say)
            report.made.append(each.target.name)
            _write_index(request.out_dir)
            say(_made(each.target, facts))
        _write_index(request.out_dir)
        if target is not None:
            report.pushed = _push(request, planned, {*report.made}, target, say)
    return report


@contextmanager
def _output(folder: Path) -> Iterator[None]:
    """The folder of releases, this command's alone; not there afterwards if it stayed empty."""
    with held(folder):
        with disk_errors(folder):
            release_folder.tidy(folder)
        yield


def _write_index(folder: Path) -> None:
    with disk_errors(folder, "mend that and run the command again: the releases are whole"):
        write_collection(folder)


def _plan(request: Request, choice: Choice) -> list[_Planned]:
    """What is to be made and what is there, before the first is begun.

    Raises:
        ConfigError: a name that no release may have.
        ConversionError: a place is taken by something else.
    """
    planned = []
    for candidate in choice.candidates:
        name = request.name or str(candidate.state["model"].get("name", "unnamed"))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", name):
            raise ConfigError(
                f"--name {name}: expected up to 60 letters, digits, points, dashes and underscores"
            )
        # Iterations first: names sort as the run went.
        words = f"{candidate.path.name}-{count_in_words(candidate.tokens)}-tokens"
        target = request.out_dir / f"{name}-{words}"
        manifest = release_folder.manifest_digest(candidate.path)
        there = _is_there(request, target, manifest)
        planned.append(_Planned(candidate, name, target, manifest, there))
    return planned


def _is_there(request: Request, target: Path, manifest: str) -> bool:
    """Whether a release lies at `target` as wanted.

    Raises:
        ConversionError: something else does, and it is not to be replaced.
    """
    if not os.path.lexists(target):
        return False
    _refuse_foreign(target)
    why = _difference(read_release(target), request.options, manifest)
    if why is None:
        why = release_folder.fault(target, request.verify_existing, request.show_progress)
        why = why and f"is damaged: {why}"
    if why is None:
        return True
    if not request.overwrite:
        raise ConversionError(f"{target}: {why}; make it anew with --overwrite")
    return False


def _refuse_foreign(target: Path) -> None:
    foreign = release_folder.foreign_file(target) if target.is_dir() else "is no folder"
    if foreign is not None:
        raise ConversionError(
            f"{target}: holds what mvlm release did not write ({foreign}); remove it, or name "
            "another folder"
        )


def _difference(facts: dict[str, Any] | None, options: Options, manifest: str) -> str | None:
    if facts is None:
        return f"is damaged: {STATE_FILE} cannot be read"
    if facts["source"]["manifest_sha256"] != manifest:
        return "was made from another checkpoint of this iteration"
    there, wanted = facts["options"], asdict(options)
    if there.get("verify"):
        # What was verified serves who asked for less.
        wanted["verify"] = True
    for name, value in wanted.items():
        if there.get(name) != value:
            return f"was made with {name} {there.get(name)}, not {value}"
    return None


def _make(
    request: Request, planned: _Planned, history: History, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write one release, verify it, and give it its name."""
    candidate, options = planned.candidate, request.options
    name = planned.target.name
    facts = training_facts(candidate, history)
    say(f"{planned.target}: being made from {candidate.path}")
    with draft(planned.target) as begun:
        hidden = begun.path
        with disk_errors(planned.target):
            summary = export_checkpoint(
                candidate.path,
                hidden,
                dtype=options.dtype,
                max_shard_bytes=options.max_shard_bytes,
                show_progress=request.show_progress,
            )
            # It lists the export's files alone; a release has SHA256SUMS.
            (hidden / MARKER).unlink()
            if options.with_optimizer:
                release_folder.include_checkpoint(candidate.path, hidden)
        verified = None
        if options.verify:
            say(f"{planned.target}: being compared with the checkpoint's own logits")
            verified = verify(hidden, candidate.path, options.dtype, name)
        facts |= {
            "licence": options.licence,
            "base_model": options.base_model,
            "verification": verified and asdict(verified),
            "export": _exported(summary, options, facts["precision"]),
            "options": asdict(options),
            "source": {
                "checkpoint": candidate.path.name,
                "manifest_sha256": planned.manifest_sha256,
                "released_by": f"megatron-vlm {megatron_vlm.__version__}",
            },
        }
        facts = {"format": STATE_FORMAT, "release": name, "name": planned.name, **facts}
        with disk_errors(planned.target):
            _describe(hidden, candidate, history, facts)
            release_folder.write_sums(hidden, request.show_progress)
            replace = os.path.lexists(planned.target)
            if replace:
                # Making it has taken its time.
                _refuse_foreign(planned.target)
            begun.commit(replace)
    return facts


def _describe(hidden: Path, candidate: Candidate, history: History, facts: dict[str, Any]) -> None:
    """Write all but the weights; `facts` gets the files' sizes."""
    title = f"{facts['name']}, {count_in_words(candidate.tokens)} tokens"
    picture = curve.draw(history, candidate.iteration, candidate.tokens, title)
    if picture is not None:
        release_folder.write(hidden, curve.FILE, picture)
    config = with_short_paths(load_recipe(candidate.path / "config.yaml"))
    release_folder.write(hidden, CONFIG_FILE, dump_yaml(config))
    facts["files"] = release_folder.files_of(hidden)
    release_folder.write(hidden, CARD, model_card(facts))
    facts["files"] = release_folder.files_of(hidden)
    release_folder.write(hidden, STATE_FILE, release_folder.as_json(facts))


def _exported(summary: ExportSummary, options: Options, precision: str | None) -> dict[str, Any]:
    trained, weights = parameter_dtype(precision or ""), AS_TRAINED
    if options.dtype != "keep" and summary.dtype != trained:
        coarser = summary.dtype.itemsize < trained.itemsize
        weights = (
            f"rounded from {_name(trained)}" if coarser else "the optimizer's where it has them"
        )
    return {
        "architecture": summary.family.architecture,
        "model_type": summary.family.model_type,
        "dtype": _name(summary.dtype),
        "weights": weights,
        "tensors": summary.tensors,
        "parameters": summary.parameters,
        "bytes": summary.bytes,
        "shards": summary.shards,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _made(target: Path, facts: dict[str, Any]) -> str:
    found = facts["verification"]
    verified = (
        "not verified"
        if found is None
        else f"verified: max relative difference {found['max_relative_difference']:.1e}"
    )
    return f"{target}: made, {bytes_in_words(sum(facts['files'].values()))}, {verified}"


def _push(
    request: Request,
    planned: list[_Planned],
    made: set[str],
    target: PushTarget,
    say: Callable[[str], None],
) -> list[str]:
    """Send what is not there yet, then the list of all that is there.

    Args:
        request: the command's.
        planned: what is to be there.
        made: releases of this command.
        target: where to.
        say: told of each.

    Raises:
        ConversionError: a release is damaged, or what is there is not to be replaced; nothing was
            sent.
        PushError: something did not arrive.
    """
    mine = {each.revision: each for each in planned}
    names = {each.name for each in planned}
    local = {
        facts["release"].removeprefix(f"{facts['name']}-"): facts
        for facts in releases(request.out_dir)
        if facts["name"] in names
    }
    there = target.pushed(list(local))
    sent = []
    for revision, each in mine.items():
        if there.get(revision) == (each.target / SUMS_FILE).read_text():
            say(f"{revision}: was pushed before")
        else:
            sent.append(revision)
    for revision in sent:
        folder = mine[revision].target
        # Every digest was taken already of what was made now, or of all with --verify-existing.
        unread = not (folder.name in made or request.verify_existing)
        why = release_folder.fault(folder, unread, request.show_progress)
        if why is not None:
            raise ConversionError(
                f"{folder}: is damaged: {why}; nothing was pushed; make it anew "
                "with --verify-existing --overwrite"
            )
        if revision in there and not request.overwrite:
            raise ConversionError(
                f"--push {request.push}: {revision} is there already and differs from "
                f"{folder}; nothing was pushed; replace it with --overwrite"
            )
    target.refuse_foreign(sent)
    for revision in sent:
        say(f"{revision}: being pushed")
        if (mine[revision].target / CHECKPOINT_FOLDER).is_dir():
            say(
                f"{revision}: with its checkpoint, whose {CHECKPOINT_FOLDER}/config.yaml tells "
                "paths of this machine"
            )
        target.push(revision, mine[revision].target)
        there[revision] = ""
    listed = [facts for revision, facts in local.items() if revision in there]
    links = {facts["release"]: revision for revision, facts in local.items()}
    target.push_index(collection_files(listed, lambda name: target.link(links[name])))
    return sent


def as_json_line(report: Report) -> str:
    """A command's result for a program."""
    return json.dumps(asdict(report))
