"""Saving and loading a run: model, optimizer, counters. The face of this room."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from pydantic import ValidationError
from torch.distributed.checkpoint.api import CheckpointException

import megatron_vlm
from megatron_vlm.checkpoint import folder
from megatron_vlm.checkpoint.lock import RunLock
from megatron_vlm.checkpoint.optimizer_state import (
    load_main_parameters,
    load_optimizer_tensors,
    optimizer_tensors,
)
from megatron_vlm.checkpoint.verify import verify_files, verify_index
from megatron_vlm.checkpoint.writer import CheckpointWriter, first_cause
from megatron_vlm.config import ModelConfig, RunConfig, dump_yaml, with_absolute_paths
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.engine.trainable import Trainable
from megatron_vlm.errors import CheckpointError, DamagedCheckpoint
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.resilience import attempts


@dataclass
class Progress:
    """Where a run stands: all there is to know besides tensors."""

    iteration: int = 0
    consumed_samples: int = 0
    """Packed rows."""
    consumed_documents: int = 0
    """Source samples."""
    consumed_tokens: int = 0
    """Real tokens."""
    optimizer_steps: int = 0
    """Steps that were not skipped."""
    skipped_iterations: int = 0
    nan_iterations: int = 0
    failures_in_a_row: int = 0
    """Steps skipped since the last one that was taken."""
    failed_samples: int = 0
    """Source samples that could not be read and were left blank."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the newest steps that were taken, for `guard`."""
    iterations_to_skip: list[int] = field(default_factory=list)
    """Which spikes have made the run pass over, on top of the configuration's."""
    rollbacks: int = 0
    """Times that the run was set back."""
    cursor: dict[str, Any] | None = None
    """Where the next row comes from (`data.stream.Cursor`); null before the first."""


class Checkpointer:
    """Saves a run under `run_dir/checkpoints`."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer_json: str,
        template: TemplateText | None,
        stream: dict[str, Any],
    ) -> None:
        """Nothing is written yet.

        Args:
            config: the run; checkpoints carry it.
            tokenizer_json: the data set's `tokenizer.json`; checkpoints carry it too.
            template: what the model is asked by, carried likewise; null: the built-in format.
            stream: what decides the order of the data (`data_stream`).
        """
        settings = config.checkpoint
        self.root = Path(config.run_dir) / "checkpoints"
        self._config = config
        self._stream = stream
        self._texts = {
            "config.yaml": dump_yaml(with_absolute_paths(config)),
            folder.TOKENIZER: tokenizer_json,
        }
        if template is not None:
            self._texts[folder.TEMPLATE] = template.to_json()
        self._writer = CheckpointWriter(
            self.root, settings.async_save, settings.keep_last, settings.keep_every
        )

    def save(self, trainable: Trainable, progress: Progress) -> None:
        """Write a checkpoint of `progress.iteration`; collective.

        Raises:
            CheckpointError: it could not be written; raised on every rank.
        """
        trainable.gather_parameters()
        model_state = trainable.model.sharded_state_dict()
        optimizer_state = optimizer_tensors(trainable, model_state, empty=False)
        tensors = {**model_state, **optimizer_state}
        state = {
            "progress": asdict(progress),
            "model": self._config.model.model_dump(mode="json"),
            "precision": self._config.training.precision,
            "data": self._stream,
            "frozen": sorted(self._config.training.freeze),
            "layout": asdict(trainable.model.topology.layout),
            "versions": {
                "megatron_vlm": megatron_vlm.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        self._writer.write(progress.iteration, tensors, state, self._texts)

    def wait(self) -> None:
        """Finish an asynchronous save, waiting for it; collective."""
        self._writer.wait()

    def poll(self) -> None:
        """Finish an asynchronous save that is done; collective."""
        self._writer.poll()

    def close(self) -> None:
        """Finish what is under way."""
        self._writer.close()


def hold_run_dir(config: RunConfig) -> RunLock | None:
    """Keep other runs out of `run_dir`; collective, rank 0 holds it.

    Raises:
        CheckpointError: on every rank, when another run is in it.
    """
    found: list[RunLock] = []

    # The attempt before this one may be on a node that was cut off, and ends with its lease.
    replaces = attempts.VARIABLE in os.environ
    patience = 2 * config.resilience.node_timeout_s if replaces else 0.0

    def take() -> None:
        found.append(RunLock(Path(config.run_dir), patience))

    _agree(take if dist.get_rank() == 0 else lambda: None)
    return found[0] if found else None


def find_start(
    config: RunConfig, stream: dict[str, Any], tokenizer_json: str
) -> tuple[Path | None, bool]:
    """Where a run starts from: (checkpoint or nothing, with its optimizer and counters?).

    Rank 0 looks, so that ranks never differ about what a shared file system shows them; it also
    clears away what a crash left. Collective.

    Raises:
        CheckpointError: on every rank, when the rows would not be those that the saved run
            counted, token ids would mean other text, `checkpoint.load` names a run that has
            nothing left to do, or `run_dir` should hold a checkpoint and does not.
    """
    found: list[Any] = [None, True]

    def look() -> None:
        root, settings = Path(config.run_dir) / "checkpoints", config.checkpoint
        folder.tidy(root)
        if folder.list_iterations(root):
            found[0] = folder.find_checkpoint(root)
        elif settings.load is not None:
            found[:] = folder.find_checkpoint(Path(settings.load)), settings.load_optimizer
        note = root / folder.LATEST
        if note.exists() and not folder.list_iterations(root):
            raise CheckpointError(
                f"{note} names iteration {note.read_text().strip()}, but no whole checkpoint is "
                f"beside it (a folder iter_... with {folder.MANIFEST}); restore it, or remove that "
                "file to start anew"
            )
        if found[0] is not None and settings.same_tokenizer:
            _check_tokenizer(found[0], tokenizer_json)
        if found[0] is not None and found[1]:
            state = folder.read_state(found[0])
            _check_trained(found[0], state)
            _check_stream(found[0], state["data"], stream)
            done, total = state["progress"]["iteration"], config.training.train_iters
            if found[0].parent != root and done >= total:
                raise CheckpointError(
                    f"checkpoint.load={settings.load} stands at iteration {done}, and "
                    f"training.train_iters is {total}: nothing is left to do; raise it, or take "
                    "the weights alone with checkpoint.load_optimizer=false"
                )

    _agree(look if dist.get_rank() == 0 else lambda: None)
    dist.broadcast_object_list(found, src=0)
    return found[0], found[1]


def _check_tokenizer(path: Path, tokenizer_json: str) -> None:
    file = path / folder.TOKENIZER
    # Weights may be imported without one.
    saved = file.read_text() if file.exists() else tokenizer_json
    if saved == tokenizer_json:
        return
    # As the data set writes it: with the special tokens, which imported ones may lack.
    if (
        Tokenizer.from_json(saved, str(file)).to_json()
        != Tokenizer.from_json(tokenizer_json).to_json()
    ):
        raise CheckpointError(
            f"{path} was trained with another tokenizer than data.train: its token ids mean other "
            f"text; build the data set with --tokenizer {file}, or set "
            "checkpoint.same_tokenizer=false if that is meant"
        )


def _check_trained(path: Path, state: dict[str, Any]) -> None:
    if "imported" in state:
        raise CheckpointError(f"{path} was imported and holds weights alone; {_from_weights(path)}")


def _from_weights(path: Path) -> str:
    return (
        f"start a new run_dir from these weights alone with checkpoint.load={path} "
        "checkpoint.load_optimizer=false"
    )


def _check_stream(path: Path, saved: dict[str, Any], stream: dict[str, Any]) -> None:
    for name, value in stream.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{path} was trained with {name} {saved.get(name)}, this run has {value}: the "
                f"position in the data would mean other rows; restore it, or {_from_weights(path)}"
            )


def fall_back(config: RunConfig, error: DamagedCheckpoint) -> str:
    """Set the newest checkpoint of `run_dir` aside, so that the one before it is; collective.

    Args:
        config: the run.
        error: what was found when it was loaded.

    Returns:
        What was done, for the log.

    Raises:
        DamagedCheckpoint: there is none before it, or `checkpoint.fall_back` is off.
    """
    root, done = Path(config.run_dir) / "checkpoints", [""]

    def set_aside() -> None:
        iterations = folder.list_iterations(root)
        if len(iterations) < 2 or not config.checkpoint.fall_back:
            raise error
        number = int(folder.find_checkpoint(root).name.rpartition("_")[2])
        if number == iterations[0]:
            raise error
        kept = folder.set_aside(root, number)
        done[0] = f"{error}; it is kept as {kept.name}, and the one before it is taken"

    _agree(set_aside if dist.get_rank() == 0 else lambda: None)
    dist.broadcast_object_list(done, src=0)
    return done[0]


def load_run(path: Path, trainable: Trainable, config: RunConfig, optimizer: bool) -> Progress:
    """Load a checkpoint of any layout into a model being trained; collective.

    Args:
        path: a checkpoint, a `checkpoints/` folder or a run folder.
        trainable: built for this run's layout.
        config: this run.
        optimizer: whether to take the optimizer's state and the counters too.

    Returns:
        Where the saved run stood; the start if `optimizer` is false.
    """
    found, state = _checked(path, config, optimizer)
    model_state = trainable.model.sharded_state_dict()
    # The engine takes the tensors out of what it is given to load.
    parameters = {name: entry.data for name, entry in model_state.items()}
    wanted: dict[str, Any] = dict(model_state)
    if optimizer:
        wanted |= optimizer_tensors(trainable, model_state, empty=True)
    loaded = _load_tensors(found, wanted)
    _fill(parameters, loaded)
    if not optimizer:
        load_main_parameters(trainable)
        return Progress()
    progress = Progress(**state["progress"])
    load_optimizer_tensors(trainable, parameters, loaded, progress.optimizer_steps)
    return progress


def load_model(path: Path, model: VisionLanguageModel, config: RunConfig) -> Progress:
    """Load weights alone; returns where the saved run stood. Collective."""
    found, state = _checked(path, config, optimizer=False)
    model_state = model.sharded_state_dict()
    parameters = {name: entry.data for name, entry in model_state.items()}
    _fill(parameters, _load_tensors(found, model_state))
    return Progress(**state["progress"])


def _checked(path: Path, config: RunConfig, optimizer: bool) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at `path` and its state, fit to be loaded into this run."""
    found: list[Any] = []

    def verify() -> None:
        checkpoint = folder.find_checkpoint(path)
        rank, size = dist.get_rank(), dist.get_world_size()
        try:
            verify_files(checkpoint, rank, size, config.checkpoint.verify_on_load)
            if rank == 0:
                verify_index(checkpoint)
            state = folder.read_state(checkpoint)
        except CheckpointError as error:
            raise type(error)(f"{error}{_others(checkpoint)}") from error
        _check_model(checkpoint, state, config)
        if optimizer:
            _check_optimizer(checkpoint, state, config)
        found[:] = checkpoint, state

    _agree(verify)
    return found[0], found[1]


def _others(checkpoint: Path) -> str:
    """How to go back to another checkpoint, if the run has one."""
    root = checkpoint.parent
    others = [
        n for n in folder.list_iterations(root) if root / folder.checkpoint_name(n) != checkpoint
    ]
    if not others:
        return ""
    return (
        f" (also here: iteration {', '.join(map(str, others))}; to go back to one, write its "
        f"number into {root / folder.LATEST})"
    )


def _agree(check: Callable[[], None]) -> None:
    """Run `check` on every rank; a failure on one is raised on all."""
    failure: str | None = None
    damaged = False
    try:
        check()
    except (CheckpointError, OSError) as error:
        failure, damaged = str(error), isinstance(error, DamagedCheckpoint)
    except Exception as error:  # the others wait for this rank's word, whatever happened
        failure = f"{type(error).__name__}: {error}"
    failures: list[tuple[str | None, bool]] = [(None, False)] * dist.get_world_size()
    dist.all_gather_object(failures, (failure, damaged))
    for text, is_damaged in failures:
        if text is not None:
            raise (DamagedCheckpoint if is_damaged else CheckpointError)(text)


def _check_model(path: Path, state: dict[str, Any], config: RunConfig) -> None:
    saved, wanted = _meaning(path, state["model"]), _plain(config.model)
    for name in ("language", "vision", "adapter"):
        difference = _first_difference(saved.get(name), wanted.get(name), name)
        if difference is not None:
            field, theirs, ours = difference
            advice = "use the model it was trained with, or another checkpoint"
            if (path / folder.MODEL).is_file():
                advice = f"give its own, model={path / folder.MODEL}, or another checkpoint"
            if (field, theirs) == ("vision", None):
                # Told of the way that does not exist, not only of the one that does.
                advice = f"an encoder cannot be added to a checkpoint without one: {advice}"
            raise CheckpointError(
                f"{path} is of another model: model.{field} is {_shown(theirs)} there and "
                f"{_shown(ours)} here; {advice}"
            )


def _shown(value: Any) -> str:
    """A value as one says it: of a section, only whether there is one."""
    if isinstance(value, dict):
        return "given"
    return "null" if value is None else str(value)


def _meaning(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved model with what it does not say: it may be older than some fields."""
    try:
        return _plain(ModelConfig.model_validate(saved))
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise CheckpointError(
            f"{path / folder.STATE}: model.{where} is of another version of megatron-vlm "
            f"({detail['msg']}); use the version that wrote it"
        ) from None


def _plain(model: ModelConfig) -> dict[str, Any]:
    """A model with every default resolved that stands for another field."""
    found = model.model_dump(mode="json")
    language = model.language
    found["language"] |= {"num_query_groups": language.query_groups}
    if not language.multi_latent_attention:
        found["language"] |= {"kv_channels": language.head_dim}
    if model.vision is not None:
        found["adapter"] |= {"hidden_size": model.adapter.widths(model.vision)[1]}
    return found


# Fields that may change between runs of one model: they shape no tensor's meaning.
_FREE_FIELDS = {
    "min_pixels",
    "max_pixels",
    "init_method_std",
    "moe_aux_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_token_dispatcher_type",
    "mtp_loss_scaling_factor",
    "max_position_embeddings",
}


def _first_difference(saved: Any, wanted: Any, name: str) -> tuple[str, Any, Any] | None:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in sorted(saved.keys() | wanted.keys()):
            if key not in _FREE_FIELDS:
                found = _first_difference(saved.get(key), wanted.get(key), f"{name}.{key}")
                if found is not None:
                    return found
        return None
    return None if saved == wanted else (name, saved, wanted)


def _check_optimizer(path: Path, state: dict[str, Any], config: RunConfig) -> None:
    half, was_half = (
        precision not in ("fp64", "fp32")
        for precision in (config.training.precision, state["precision"])
    )
    if half != was_half:
        raise CheckpointError(
            f"{path} was trained in training.precision {state['precision']}, this run is in "
            f"{config.training.precision}; resume in that, or {_from_weights(path)}"
        )
    if sorted(config.training.freeze) != state["frozen"]:
        raise CheckpointError(
            f"{path} was trained with training.freeze {state['frozen']}, this run has "
            f"{sorted(config.training.freeze)}; resume with that, or {_from_weights(path)}"
        )


def _load_tensors(path: Path, wanted: dict[str, Any]) -> dict[str, torch.Tensor]:
    sharded, _, factories = load_preprocess(wanted)
    tensors, _ = extract_matching_values(sharded, lambda value: isinstance(value, ShardedTensor))
    try:
        loaded = TorchDistLoadShardedStrategy().load(tensors, path)
    # torch's own is no Exception; it is raised on every rank.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{path}: cannot be loaded ({first_cause(error)}); the checkpoint is damaged or of "
            "another model"
        ) from error
    return apply_factory_merges(loaded, factories)


@torch.no_grad()
def _fill(parameters: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(loaded[name])
