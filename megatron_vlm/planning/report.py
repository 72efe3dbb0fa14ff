"""The plan of a run as one object: who sits where, what each stage holds, what a step consumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.planning.memory import (
    Assumptions,
    RankMemory,
    memory_of_stage,
    picture_tokens,
)
from megatron_vlm.planning.shapes import (
    Parameters,
    active_parameters,
    model_parameters,
    rank_parameters,
)
from megatron_vlm.topology.layout import Layout, resolve_layout


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage: all its ranks hold the same amounts."""

    pp: int
    chunks: list[str]
    """What each model chunk holds, in the layout's letters: E embedding, t layer, L loss."""
    layers: list[int]
    """Numbers of its decoder layers, from 0."""
    parameters: Parameters
    """Of each rank."""
    memory: RankMemory
    """Of each rank."""


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in the language mesh, and in the experts' beside it."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int


@dataclass(frozen=True)
class RunPlan:
    """Everything `mvlm plan` tells."""

    layout: Layout
    model: Parameters
    """The whole model, each parameter once."""
    active: int
    """Decoder parameters that one token passes through."""
    stages: list[StagePlan]
    tokens_per_step: int
    """Tokens of all packed rows of one optimizer step, padding included."""
    picture_tokens_per_row: int
    """As assumed."""

    @property
    def worst(self) -> StagePlan:
        """The stage whose ranks need most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    def places(self) -> list[Place]:
        """Where every rank sits, in order."""
        return [place(self.layout, rank) for rank in range(self.layout.world_size)]

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and text, sizes in bytes."""
        layout, worst = self.layout, self.worst
        return {
            "world_size": layout.world_size,
            "layout": layout.describe(),
            "micro_batches": layout.num_micro_batches,
            "tokens_per_step": self.tokens_per_step,
            "picture_tokens_per_row": self.picture_tokens_per_row,
            "parameters": {"total": self.model.total, **asdict(self.model), "active": self.active},
            "stages": [
                {
                    "pipeline_rank": stage.pp,
                    "chunks": stage.chunks,
                    "layers": stage.layers,
                    "parameters_per_rank": {
                        "total": stage.parameters.total,
                        **asdict(stage.parameters),
                    },
                    "bytes_per_rank": {"total": stage.memory.total, **stage.memory.kinds()},
                }
                for stage in self.stages
            ],
            "worst": {
                "pipeline_rank": worst.pp,
                "rank": layout.rank(pp=worst.pp),
                "bytes": worst.memory.total,
            },
            "ranks": [asdict(each) for each in self.places()],
        }


def plan_run(config: RunConfig, world_size: int, assumptions: Assumptions) -> RunPlan:
    """Plan `config` on `world_size` processes.

    Raises:
        ConfigError: the layout cannot run, or an assumption does not fit.
    """
    layout = resolve_layout(config, world_size)
    stages = [
        StagePlan(
            pp=pp,
            chunks=[layout.stages[i * layout.pp + pp] for i in range(layout.num_chunks)],
            layers=[n for i in range(layout.num_chunks) for n in layout.layers_of(pp, i)],
            parameters=rank_parameters(config.model, layout, pp),
            memory=memory_of_stage(config, layout, pp, assumptions),
        )
        for pp in range(layout.pp)
    ]
    return RunPlan(
        layout=layout,
        model=model_parameters(config.model),
        active=active_parameters(config.model.language),
        stages=stages,
        tokens_per_step=config.training.global_batch_size * config.training.seq_length,
        picture_tokens_per_row=picture_tokens(config, assumptions),
    )


def place(layout: Layout, rank: int) -> Place:
    """Where `rank` sits. Experts share a stage's ranks: tensor fastest, then expert."""
    at = layout.coordinates(rank)
    within = rank % (layout.world_size // layout.pp)
    return Place(
        rank=rank,
        tp=at.tp,
        cp=at.cp,
        dp=at.dp,
        pp=at.pp,
        ep=within // layout.etp % layout.ep,
        etp=within % layout.etp,
    )
