"""The arithmetic of a layout: sizes, coordinates, stages. No process, no torch.

`resolve_layout` turns a configuration and a number of processes into a frozen `Layout`, or
refuses with the field, its value, and the nearest values that would work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.errors import ConfigError

_LONGEST_LAYOUT = 10_000
"""Letters of a pipeline layout: far beyond any model, and short enough to look through."""


@dataclass(frozen=True)
class Coordinates:
    """A rank's place in the language mesh."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of every parallel dimension for one number of processes.

    The order of ranks is megatron-core's: tensor fastest, then context, data, pipeline.
    `stages[i]` is what virtual stage i (chunk `i // pp` of pipeline rank `i % pp`) holds, in the
    engine's letters: E embedding, t layer, L loss.
    """

    world_size: int
    tp: int
    cp: int
    dp: int
    pp: int
    vpp: int | None
    ep: int
    etp: int
    sequence_parallel: bool
    batch_p2p_comm: bool
    stages: tuple[str, ...]
    num_micro_batches: int

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` sits in the language mesh."""
        inner = self.tp * self.cp
        return Coordinates(
            tp=rank % self.tp,
            cp=rank // self.tp % self.cp,
            dp=rank // inner % self.dp,
            pp=rank // (inner * self.dp),
        )

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    @property
    def embedding_stage(self) -> int:
        """Pipeline rank that embeds tokens."""
        return next(i for i, stage in enumerate(self.stages) if "E" in stage) % self.pp

    @property
    def loss_stage(self) -> int:
        """Pipeline rank that computes the loss."""
        return next(i for i, stage in enumerate(self.stages) if "L" in stage) % self.pp

    @property
    def num_chunks(self) -> int:
        """Model chunks held by each rank."""
        return self.vpp or 1

    def layers_of(self, pp: int, chunk: int) -> range:
        """Layer numbers (from 0) in chunk `chunk` of pipeline rank `pp`."""
        index = chunk * self.pp + pp
        before = sum(stage.count("t") for stage in self.stages[:index])
        return range(before, before + self.stages[index].count("t"))

    def describe(self) -> str:
        """One line for logs: only the dimensions in use."""
        sizes = {"TP": self.tp, "CP": self.cp, "PP": self.pp, "VPP": self.vpp or 1}
        sizes |= {"EP": self.ep, "ETP": self.etp, "DP": self.dp}
        used = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.sequence_parallel:
            used.append("SP")
        return " ".join(used) or "one process"


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def nearest(options: list[int], wanted: int) -> str:
    """Up to three of `options` nearest to `wanted`, as text for an error."""
    chosen = sorted(sorted(options, key=lambda option: abs(option - wanted))[:3])
    return " or ".join(str(option) for option in chosen) if chosen else "none"


def parse_stages(text: str) -> tuple[str, ...]:
    """Expand megatron-core's pipeline layout notation: `Et*3|(tt|)*29,t|L` to one text a stage.

    Raises:
        ConfigError: a letter other than E, t, L, or a malformed repetition.
    """

    def repeat(match: re.Match[str]) -> str:
        # By the count of its digits first: a number of thousands of them takes long to read.
        if len(match[2]) > 5 or len(match[1]) * int(match[2]) > _LONGEST_LAYOUT:
            raise _too_long(text)
        return match[1] * int(match[2])

    flat = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"(.)\*(\d+)"):
        if len(flat) > _LONGEST_LAYOUT:
            raise _too_long(text)
        flat = re.sub(pattern, repeat, flat)
    if bad := sorted(set(flat) - set("EtL|")):
        raise ConfigError(
            f"parallel.pipeline_model_parallel_layout {text!r}: unexpected {''.join(bad)!r}; "
            "expected E (embedding), t (layer), L (loss), | between stages, x*n and (...)*n"
        )
    return tuple(flat.split("|"))


def _too_long(text: str) -> ConfigError:
    return ConfigError(
        f"parallel.pipeline_model_parallel_layout {text[:60]!r} is of more than {_LONGEST_LAYOUT} "
        "letters; expected as many t as model.language.num_layers"
    )


def resolve_layout(config: RunConfig, world_size: int) -> Layout:
    """Check `config` against `world_size` processes and fill in the defaults.

    Raises:
        ConfigError: one line for the first thing that cannot run.
    """
    parallel, language = config.parallel, config.model.language
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    has_experts = language.num_moe_experts is not None
    dp = _data_parallel_size(world_size, tp, cp, pp)
    sequence_parallel = parallel.sequence_parallel
    if sequence_parallel is None:
        sequence_parallel = tp > 1 and has_experts
    etp = parallel.expert_tensor_parallel_size or (tp if ep == 1 else 1)
    _check_tensor(config, tp)
    _check_sequence_parallel(config, tp, sequence_parallel, has_experts)
    if has_experts:
        _check_experts(config, world_size, tp, pp, ep, etp)
    elif ep > 1 or (parallel.expert_tensor_parallel_size or 1) > 1:
        raise ConfigError(
            f"parallel.expert_model_parallel_size {ep} / expert_tensor_parallel_size {etp}: the "
            "model has no experts (model.language.num_moe_experts is null); expected 1"
        )
    stages, vpp = _stages(config, pp)
    batch_p2p = parallel.batch_p2p_comm
    if batch_p2p is None:
        batch_p2p = vpp is None
    if batch_p2p and vpp is not None and pp == 2:
        raise ConfigError(
            "parallel.batch_p2p_comm true with virtual stages at pipeline_model_parallel_size 2: "
            "two sends to one peer in a batch are matched wrongly (an engine fault); set it to "
            "false or null"
        )
    micro_batches = _check_batch(config, dp, pp, vpp)
    _check_rows(config, cp, tp, sequence_parallel)
    _check_overlap(config, ep, pp, vpp)
    _check_precision(config)
    _check_groups(config, world_size, dp)
    return Layout(
        world_size=world_size,
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        sequence_parallel=sequence_parallel,
        batch_p2p_comm=batch_p2p,
        stages=stages,
        num_micro_batches=micro_batches,
    )


def _check_groups(config: RunConfig, world_size: int, dp: int) -> None:
    size, replica = config.vision_parallel.balance_group_size, world_size // dp
    if size is not None and config.vision_parallel.placement == "first_stage":
        raise ConfigError(
            f"vision_parallel.balance_group_size {size} has no meaning with vision_parallel."
            "placement=first_stage, where each replica encodes its own pictures; leave one out"
        )
    if size is not None and (world_size % size or size % replica):
        raise ConfigError(
            f"vision_parallel.balance_group_size {size}: expected a divisor of the {world_size} "
            f"ranks and a multiple of the {replica} of a data-parallel replica; null takes all"
        )


def _data_parallel_size(world_size: int, tp: int, cp: int, pp: int) -> int:
    if world_size % (tp * cp * pp):
        raise ConfigError(
            f"{world_size} processes cannot hold parallel.tensor_model_parallel_size {tp} x "
            f"context_parallel_size {cp} x pipeline_model_parallel_size {pp} = {tp * cp * pp}; "
            f"start a multiple of {tp * cp * pp} processes, or choose sizes whose product is "
            f"{nearest(divisors(world_size), tp * cp * pp)}"
        )
    return world_size // (tp * cp * pp)


def _check_tensor(config: RunConfig, tp: int) -> None:
    language = config.model.language
    shared = {
        "num_attention_heads": language.num_attention_heads,
        "num_query_groups": language.query_groups,
        "ffn_hidden_size": language.ffn_hidden_size,
        "vocab_size": language.vocab_size,
    }
    if language.moe_shared_expert_intermediate_size:
        shared["moe_shared_expert_intermediate_size"] = language.moe_shared_expert_intermediate_size
    for name, size in shared.items():
        if size % tp:
            raise ConfigError(
                f"parallel.tensor_model_parallel_size {tp} does not divide model.language.{name} "
                f"{size}; nearest that do: {nearest(divisors(size), tp)}"
            )


def _check_sequence_parallel(config: RunConfig, tp: int, on: bool, has_experts: bool) -> None:
    if on and tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel true needs parallel.tensor_model_parallel_size above 1; "
            "set it to false or null"
        )
    if not on and tp > 1 and has_experts:
        raise ConfigError(
            f"parallel.sequence_parallel false with tensor_model_parallel_size {tp} and experts: "
            "the engine cannot train experts so; set it to true or null, or use tensor size 1"
        )


def _check_experts(config: RunConfig, world_size: int, tp: int, pp: int, ep: int, etp: int) -> None:
    language = config.model.language
    experts, width = language.num_moe_experts or 1, language.moe_ffn_hidden_size or 1
    if experts % ep:
        raise ConfigError(
            f"parallel.expert_model_parallel_size {ep} does not divide "
            f"model.language.num_moe_experts {experts}; nearest that do: "
            f"{nearest(divisors(experts), ep)}"
        )
    where = f"parallel.expert_tensor_parallel_size {etp}"
    if ep == 1 and etp != tp:
        raise ConfigError(
            f"{where} differs from tensor_model_parallel_size {tp} at expert_model_parallel_size "
            f"1, which trains wrongly (an engine fault); set it to {tp} or null, or use expert "
            "parallelism"
        )
    if etp > tp:
        raise ConfigError(
            f"{where} exceeds tensor_model_parallel_size {tp}: experts cut finer than the rest are "
            f"not proven; set it to {tp} or less"
        )
    if width % etp:
        raise ConfigError(
            f"parallel.expert_tensor_parallel_size {etp} does not divide "
            f"model.language.moe_ffn_hidden_size {width}; nearest that do: "
            f"{nearest(divisors(width), etp)}"
        )
    per_stage = world_size // pp
    if per_stage % (ep * etp):
        options = [d for d in divisors(experts) if per_stage % (d * etp) == 0]
        raise ConfigError(
            f"parallel.expert_model_parallel_size {ep} x expert_tensor_parallel_size {etp} does "
            f"not divide the {per_stage} processes of a pipeline stage; nearest expert sizes that "
            f"do: {nearest(options, ep)}"
        )


def _stages(config: RunConfig, pp: int) -> tuple[tuple[str, ...], int | None]:
    parallel, layers = config.parallel, config.model.language.num_layers
    vpp = parallel.virtual_pipeline_model_parallel_size
    if vpp is not None and pp == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size {vpp} needs "
            "pipeline_model_parallel_size above 1; set it to null"
        )
    text = parallel.pipeline_model_parallel_layout
    if text is not None:
        stages = parse_stages(text)
        _check_stages(text, stages, layers, pp)
        found = len(stages) // pp
        if (vpp or 1) != found:
            if vpp is not None:
                raise ConfigError(
                    f"parallel.virtual_pipeline_model_parallel_size {vpp}: the pipeline layout "
                    f"{text!r} has {len(stages)} stages on {pp} ranks, so {found}; "
                    "set it to null or mend the layout"
                )
            vpp = found
        return stages, vpp
    parts = pp * (vpp or 1)
    if layers % parts:
        split = [layers // parts + (1 if i < layers % parts else 0) for i in range(parts)]
        drawn = "|".join("t" * count for count in split)
        options = [d for d in divisors(layers) if d % (vpp or 1) == 0] or [1]
        raise ConfigError(
            f"model.language.num_layers {layers} is not a multiple of "
            f"pipeline_model_parallel_size {pp} x virtual size {vpp or 1} = {parts}; nearest "
            f"products that divide it: {nearest(options, parts)}; or give uneven stages: "
            f"parallel.pipeline_model_parallel_layout='E{drawn}L'"
        )
    even = ["t" * (layers // parts)] * parts
    even[0] = "E" + even[0]
    even[-1] = even[-1] + "L"
    return tuple(even), vpp


def _check_stages(text: str, stages: tuple[str, ...], layers: int, pp: int) -> None:
    where = f"parallel.pipeline_model_parallel_layout {text!r}"
    joined = "".join(stages)
    if joined.count("t") != layers:
        raise ConfigError(
            f"{where} holds {joined.count('t')} layers (t); expected model.language.num_layers "
            f"{layers}"
        )
    ordered = joined.startswith("E") and joined.endswith("L")
    if not ordered or joined.count("E") != 1 or joined.count("L") != 1:
        raise ConfigError(f"{where}: expected one E, before all layers, and one L, after them")
    if pp == 1 and len(stages) > 1:
        raise ConfigError(
            f"{where} has {len(stages)} stages, pipeline_model_parallel_size is 1; set that to a "
            f"divisor of {len(stages)} above 1, or the layout to null"
        )
    if len(stages) % pp:
        raise ConfigError(
            f"{where} has {len(stages)} stages; expected a multiple of "
            f"pipeline_model_parallel_size {pp} (nearest sizes: "
            f"{nearest(divisors(len(stages)), pp)})"
        )
    idle = [rank for rank in range(pp) if not any(stages[rank::pp])]
    if idle:
        raise ConfigError(
            f"{where} gives pipeline rank {idle[0]} nothing to do; give each of the "
            f"{pp} ranks a layer, E or L"
        )


def _check_batch(config: RunConfig, dp: int, pp: int, vpp: int | None) -> int:
    training = config.training
    size, micro = training.global_batch_size, training.micro_batch_size
    if size % (micro * dp):
        below = size // (micro * dp) * micro * dp
        options = [option for option in (below, below + micro * dp) if option > 0]
        raise ConfigError(
            f"training.global_batch_size {size} is not a multiple of micro_batch_size {micro} x "
            f"{dp} data-parallel replicas; nearest that are: {nearest(options, size)}"
        )
    count = size // (micro * dp)
    if vpp is not None and count % pp:
        options = [option * micro * dp for option in (count // pp * pp, (count // pp + 1) * pp)]
        raise ConfigError(
            f"training.global_batch_size {size} gives {count} micro-batches; interleaved stages "
            f"need a multiple of pipeline_model_parallel_size {pp}; nearest batch sizes: "
            f"{nearest([option for option in options if option > 0], size)}"
        )
    return count


def _check_rows(config: RunConfig, cp: int, tp: int, sequence_parallel: bool) -> None:
    pad, length = config.data.pad_multiple, config.training.seq_length
    if length % pad:
        options = [option for option in (length // pad * pad, (length // pad + 1) * pad) if option]
        raise ConfigError(
            f"training.seq_length {length} is not a multiple of data.pad_multiple {pad}; nearest "
            f"that are: {nearest(options, length)}"
        )
    if length > config.model.language.max_position_embeddings:
        raise ConfigError(
            f"training.seq_length {length} exceeds model.language.max_position_embeddings "
            f"{config.model.language.max_position_embeddings}; lower it or raise the model's limit"
        )
    if cp > 1 and pad % (2 * cp):
        options = [d for d in range(2, pad + 1, 2) if pad % d == 0]
        raise ConfigError(
            f"parallel.context_parallel_size {cp} needs data.pad_multiple to be a multiple of "
            f"{2 * cp} (each sample is cut into {2 * cp} parts), but it is {pad}; nearest context "
            f"sizes: {nearest([d // 2 for d in options], cp)}, or set data.pad_multiple "
            f"{(pad // (2 * cp) + 1) * 2 * cp}"
        )
    tokens = config.training.micro_batch_size * length // cp
    if sequence_parallel and tokens % tp:
        raise ConfigError(
            f"parallel.sequence_parallel cuts {tokens} tokens (micro_batch_size x seq_length / "
            f"context size) into {tp} parts; change training.seq_length to a multiple of {tp * cp}"
        )


def _check_overlap(config: RunConfig, ep: int, pp: int, vpp: int | None) -> None:
    if not config.parallel.overlap_moe_expert_parallel_comm:
        return
    where = "parallel.overlap_moe_expert_parallel_comm true"
    if ep == 1:
        raise ConfigError(f"{where} needs parallel.expert_model_parallel_size above 1")
    if pp > 1 and vpp is None:
        raise ConfigError(
            f"{where} with pipeline_model_parallel_size {pp} needs "
            "parallel.virtual_pipeline_model_parallel_size (interleaved 1F1B), for example 2"
        )
    if config.model.language.moe_token_dispatcher_type != "alltoall":
        raise ConfigError(f"{where} needs model.language.moe_token_dispatcher_type alltoall")
    recompute = config.recompute
    if recompute.language == "full":
        raise ConfigError(f"{where} cannot run with recompute.language full; use selective or none")
    if recompute.language == "selective" and "moe" in recompute.language_modules:
        raise ConfigError(f"{where} cannot run with moe in recompute.language_modules; remove it")


def _check_precision(config: RunConfig) -> None:
    optimizer, precision = config.optimizer, config.training.precision
    if precision == "fp64" and optimizer.use_distributed_optimizer:
        raise ConfigError(
            "training.precision fp64 runs with the plain optimizer only; set "
            "optimizer.use_distributed_optimizer false, or use fp32"
        )
    if optimizer.overlap_param_gather and not optimizer.use_distributed_optimizer:
        raise ConfigError(
            "optimizer.overlap_param_gather true needs optimizer.use_distributed_optimizer true"
        )
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        raise ConfigError(
            "optimizer.overlap_param_gather true needs optimizer.overlap_grad_reduce true"
        )
    if optimizer.lr_warmup_iters > config.training.train_iters:
        raise ConfigError(
            f"optimizer.lr_warmup_iters {optimizer.lr_warmup_iters} exceeds training.train_iters "
            f"{config.training.train_iters}: the run would end before its learning rate is "
            "reached; lower it, 0 for none, or train longer"
        )
