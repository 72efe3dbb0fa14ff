"""The typed schema of a run. Each field has its unit and its source, or the words "our choice".

Names follow megatron-core where it has one. Nothing here touches torch: a resolved
configuration can be read, checked and planned on any machine.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_vlm.config.model_schema import ModelConfig, Section

Precision = Literal["fp64", "fp32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise"]


class ParallelConfig(Section):
    """The language model's mesh. The vision mesh is data parallel over every rank, always."""

    tensor_model_parallel_size: int = Field(1, gt=0)
    """Ranks that share each matrix."""
    pipeline_model_parallel_size: int = Field(1, gt=0)
    """Ranks that hold successive layers."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, gt=1)
    """Chunks of layers per pipeline rank (interleaved 1F1B); null for plain 1F1B."""
    pipeline_model_parallel_layout: str | None = None
    """Uneven stages, in megatron-core's notation: `Ett|ttt|tL` (E embedding, t layer, L loss)."""
    context_parallel_size: int = Field(1, gt=0)
    """Ranks that share each sequence (zig-zag within each sample)."""
    expert_model_parallel_size: int = Field(1, gt=0)
    """Ranks that share the experts."""
    expert_tensor_parallel_size: int | None = Field(None, gt=0)
    """Ranks that share each expert; null: the tensor size at EP1, else 1 (our choice)."""
    sequence_parallel: bool | None = None
    """Split activations along the sequence between TP regions; null: on where TP>1 and there are
    experts (the engine cannot train experts under TP without it)."""
    batch_p2p_comm: bool | None = None
    """Send and receive between stages in one batch; null: on without virtual stages, else off."""
    overlap_moe_expert_parallel_comm: bool = False
    """Combined 1F1B: hide the expert all-to-all of one micro-batch behind another's compute."""


class VisionParallelConfig(Section):
    """How the pictures of a step are shared out: every rank encodes, whatever its part of the
    decoder."""

    placement: Literal["all_ranks", "first_stage"] = "all_ranks"
    """Who encodes: every rank; or, to compare with, the embedding stage of each replica its own
    pictures, as in trainers that make the encoder a part of the first pipeline stage."""
    balance: Literal["greedy", "karmarkar_karp", "round_robin"] = "greedy"
    """Dearest pictures first, each to the least loaded rank; largest differencing, closer to even
    and slow for hundreds of ranks; or in turn, whatever they cost. Seed1.5-VL: greedy."""
    balance_group_size: int | None = Field(None, gt=0)
    """Ranks that encode each other's pictures: whole data-parallel replicas; null: all ranks.
    Seed1.5-VL: 128 to 256."""
    max_parts: int = Field(8, gt=0)
    """Most ranks that share one picture, each with a part of its patches: where whole pictures
    cannot be shared out evenly. 1: none is cut."""
    cost: str = "flops"
    """What a picture is taken to cost: `flops`; `measured`, by some timed passes when the run
    begins, kept in its folder and read back on resume; or a file of such a measurement."""
    exchange_window: int | None = Field(None, gt=0)
    """Most micro-batches whose features travel together, while those before are computed on; null:
    all of a step, before the first one."""
    feature_memory_gib: float | None = Field(None, gt=0)
    """GiB of features that a rank holds for micro-batches to come: windows are as small as this
    needs. null: any amount."""
    activation_memory_gib: float | None = Field(None, gt=0)
    """GiB of the encoder's activations that a rank keeps for the backward pass: what does not fit
    is encoded again there. null: all are kept, as `recompute.vision` has it."""
    device_memory_gib: float | None = Field(None, gt=0)
    """GiB that a step may take on a device: one that is planned to need more ends the run before
    it begins, with the numbers. null: the GPU's memory, the decoder's activations not counted; on
    a CPU no limit."""


class RecomputeConfig(Section):
    """What is computed again in the backward pass to save memory."""

    language: Literal["none", "selective", "full"] = "none"
    """The decoder: nothing, the modules named below, or whole layers."""
    language_modules: list[Literal["core_attn", "moe_act", "mlp", "moe", "layernorm"]] = [
        "core_attn"
    ]
    """The decoder's modules recomputed when `language` is `selective`."""
    vision: Literal["none", "selective", "full"] = "none"
    """The encoder: nothing, attention and activations, or whole layers."""


class TrainingConfig(Section):
    """How long, how much at once, how precisely."""

    train_iters: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    seq_length: int = Field(gt=0)
    """Tokens of one packed row."""
    micro_batch_size: int = Field(1, gt=0)
    """Packed rows of one forward pass."""
    global_batch_size: int = Field(gt=0)
    """Packed rows of one optimizer step, over all ranks."""
    precision: Precision = "bf16"
    """`fp64` is for proofs and needs the plain optimizer; `fp8_*` needs Transformer Engine."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Decides the initial weights, the data order and every random draw."""
    timeline_interval: int | None = Field(None, gt=0)
    """Steps between those whose timeline over all ranks is recorded, for `mvlm timeline`; null
    records none."""
    eval_interval: int | None = Field(None, gt=0)
    """Steps between validations; null validates only at the end, if there is a held-out set."""
    eval_rows: int | None = Field(None, gt=0)
    """Packed rows of each held-out set used by one validation; null uses all of it."""
    objective: str = "next_token"
    """Name of the registered training objective."""
    freeze: list[Literal["vision", "adapter", "language"]] = []
    """Parts whose weights stay as they are."""
    skip_non_finite_limit: int = Field(10, ge=0)
    """Non-finite steps in a row that are skipped before the run stops with an error."""
    iterations_to_skip: list[int] = []
    """Iterations whose data are passed over: no forward, no backward, no step of the optimizer."""
    log_interval: int = Field(1, gt=0)
    """Steps between log lines; metrics are written every step."""
    stage: str | None = None
    """Name of the stage of training that this run is, told in releases; null: not named. Our
    choice."""


class OptimizerConfig(Section):
    """AdamW, its schedule, and how its state is spread over ranks."""

    lr: float = Field(3e-4, gt=0)
    """Peak learning rate. dots.llm1: 3e-4."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay. dots.llm1: 1e-5 after both anneals."""
    vision_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the encoder's trunk, which follows the same schedule in proportion; the
    adapter learns as the decoder does. null: lr. Our choice."""
    vision_layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer of the trunk learns this much slower than the one above it, the patch embedding
    slowest. 1: all alike. BEiT: 0.65 to 0.9 in fine-tuning."""
    lr_warmup_iters: int = Field(0, ge=0)
    """Steps of linear warm-up from 0. dots.llm1: 4000."""
    lr_decay_style: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up. dots.llm1: constant, then unpublished anneals."""
    lr_decay_iters: int | None = Field(None, gt=0)
    """Step at which the decay ends; null means training.train_iters."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay; norms and biases have none. dots.llm1: 0.1."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """First moment's decay. dots.llm1: 0.9."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Second moment's decay. dots.llm1: 0.95."""
    adam_eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment. Our choice."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm over both towers; 0 does not clip. dots.llm1: 1.0."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs (distributed optimizer only)."""
    bucket_size: int | None = Field(None, gt=0)
    """Elements of one gradient bucket under overlap; null: the engine's own, 40 million or more."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} exceeds lr {self.lr}; lower it")
        return self


LongSamples = Literal["refuse", "skip", "split"]
DecoderName = Literal["auto", "cpu", "dali", "nvjpeg"]


class UntieConfig(Section):
    """Untie the Knots (arXiv 2409.04774): documents of a row cut into chunks and shuffled, which
    teaches long contexts with plain text. The defaults are the published code's."""

    seed: int = Field(47, ge=0)
    """Decides the cuts of every row, with the row's number."""
    probability: float = Field(0.3, ge=0, le=1)
    """Share of rows that are touched; the paper has 0.3 or 0.8."""
    chunk_weights: tuple[float, ...] = (0.0, 0.0, 1.0)
    """Probabilities that a document is cut into 1, 2, 3 chunks; a fourth is that of chunks of
    fixed_chunk_tokens, however many."""
    cut: Literal["even", "random"] = "even"
    """Chunks of equal length, or cut at random places."""
    fixed_chunk_tokens: int = Field(1024, gt=0)
    """Tokens of a chunk of fixed length."""
    preserve_order: bool = False
    """Keep a document's chunks in order among each other."""
    backtrace_probability: float = Field(0.0, ge=0, le=1)
    """Share of touched rows whose chunks bear random IDs, to be listed after a document's last."""


class SourceConfig(Section):
    """One data set of a mixture, and its part in it."""

    path: str
    """Folder of a built data set (`mvlm data build`)."""
    weight: float | None = Field(None, ge=0)
    """Its share, relative to the other sources' and counted as data.mixture_unit says. All sources
    of a mixture have one, or none has."""
    repeat: float = Field(1.0, gt=0)
    """Without weights: how often its samples are seen while those of a source with 1 are seen once;
    2 shows each twice. With 1 everywhere, every source ends its epoch at the same moment."""
    max_epochs: float | None = Field(None, gt=0)
    """Passes after which nothing more is drawn from it; null: endless. Where all sources have
    ended, the run ends, whatever training.train_iters says."""
    untie: UntieConfig | None = None
    """Fill rows of their own with its documents, each row one segment, cut and shuffled. For text
    that is learned throughout, of a set built with `--knots`; use data.long_samples=split."""


class MixturePoint(Section):
    """A change of the mixture's weights on the way: annealing, a curriculum."""

    tokens: int = Field(gt=0)
    """From so many tokens on, counted as they are drawn."""
    weights: dict[str, float]
    """Of each source, by name; one that is not named gets nothing."""
    ramp_tokens: int = Field(0, ge=0)
    """Reached in even steps over so many tokens; 0: at once."""


class DataConfig(Section):
    """Where samples come from and how they are packed. Paths: from the working directory."""

    train: dict[str, SourceConfig] = {}
    """The sources that are mixed, by name. In a recipe or an override a path may stand for a source
    (`data.train.NAME=FOLDER`), and for the only one (`data.train=FOLDER`)."""
    mixture_unit: Literal["tokens", "samples"] = "tokens"
    """What weights are shares of."""
    schedule: tuple[MixturePoint, ...] = ()
    """Later weights, in ascending order of their tokens."""
    validation: dict[str, str] = {}
    """Held-out sets by name: each a folder of a built data set. An override of one name adds to
    those of the recipe, `data.validation.NAME=null` takes one away, and one of the whole mapping
    (`data.validation={}`) replaces it."""
    pad_multiple: int = Field(16, gt=0)
    """Every sample is padded to a multiple of this many tokens, in every layout alike."""
    packing_rows: int = Field(64, gt=0)
    """Rows that are packed together: samples are drawn until they could fill so many, and what
    finds no room goes first into the next ones. More fill better, and mix samples that were drawn
    further apart. Our choice."""
    shuffle: bool = True
    """A new order each epoch, from training.seed."""
    chat_source: str | None = None
    """Source of train whose chat format checkpoints carry for answers and releases; null: that of
    all with dialogues, which must not differ then."""
    long_samples: LongSamples = "refuse"
    """Samples longer than training.seq_length: refuse to start, leave them out (skip), or cut them
    into rows (split), which leaves out only what is not learned throughout: conversations."""
    prefetch_steps: int = Field(2, ge=0)
    """Steps fetched ahead by a background thread."""
    num_workers: int | None = Field(None, gt=0)
    """Threads of a process that read and decode; null: its share of the machine's cores, one of
    them left to the step, at least 1 and at most 8 (our choice). Batches do not depend on it."""
    decoder: DecoderName = "auto"
    """What decodes pictures: DALI or nvJPEG on a GPU, or the CPU. auto: the first of them that this
    machine has."""
    retry_seconds: float = Field(60.0, ge=0)
    """How long a read that fails is tried again before its sample is given up. Our choice."""
    warn_seconds: float = Field(30.0, gt=0)
    """A sample that takes longer to fetch is named in the log."""
    timeout_seconds: float = Field(600.0, gt=0)
    """A sample that takes longer to fetch is given up. Our choice."""
    max_failed_share: float = Field(0.5, ge=0, le=1)
    """Stop once more than this share of a step's samples cannot be read. Those of a step that goes
    on count as blank: no loss, and named in the log. Our choice."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        weighted = {name for name, source in self.train.items() if source.weight is not None}
        if weighted and weighted != set(self.train):
            missing = sorted(set(self.train) - weighted)
            raise ValueError(
                f"train.{missing[0]} has no weight while others have one; give every source a "
                "weight, or none"
            )
        if weighted and not any(source.weight for source in self.train.values()):
            raise ValueError("train: every weight is 0; raise one")
        for name, source in self.train.items():
            if source.weight is not None and source.repeat != 1:
                raise ValueError(f"train.{name} has a weight and a repeat; keep one of them")
        if self.chat_source is not None and self.chat_source not in self.train:
            raise ValueError(
                f"chat_source names {self.chat_source!r}; expected a source of train: "
                f"{', '.join(self.train) or 'there are none'}"
            )
        before = -1
        for number, point in enumerate(self.schedule):
            unknown = sorted(set(point.weights) - set(self.train))
            if unknown:
                raise ValueError(
                    f"schedule[{number}].weights names {unknown[0]!r}; expected sources of train: "
                    f"{', '.join(self.train) or 'there are none'}"
                )
            if min(point.weights.values(), default=0) < 0 or not any(point.weights.values()):
                raise ValueError(
                    f"schedule[{number}].weights: expected numbers from 0 on, one of them above 0"
                )
            if point.tokens <= before:
                raise ValueError(
                    f"schedule[{number}].tokens {point.tokens} is not beyond those before it; put "
                    "the schedule in ascending order"
                )
            before = point.tokens
        return self


class CheckpointConfig(Section):
    """When state is written and how much of it is kept."""

    save_interval: int | None = Field(None, gt=0)
    """Steps between checkpoints; null saves only at the end and on a signal."""
    async_save: bool = False
    """Write in the background while training goes on."""
    keep_last: int | None = Field(None, gt=0)
    """Newest checkpoints kept; null keeps all."""
    keep_every: int | None = Field(None, gt=0)
    """Checkpoints at multiples of this many steps are never removed."""
    verify_on_load: bool = True
    """Compare every file's SHA-256 with the manifest before loading (sizes always are)."""
    fall_back: bool = True
    """When the newest checkpoint of run_dir is damaged, go on from the newest that is not."""
    load: str | None = None
    """A checkpoint or run folder to start from when run_dir holds none."""
    load_optimizer: bool = True
    """With `load`: take the optimizer state and the data position too, else weights alone."""
    same_tokenizer: bool = True
    """Refuse to go on from weights that were trained with another tokenizer than data.train's."""


class GuardConfig(Section):
    """What is done when the loss suddenly rises. Values are our choice."""

    spike_deviations: float | None = Field(None, gt=0)
    """A loss this many standard deviations (estimated from the median distance) above the median of
    `spike_window` is a spike; null: none is."""
    spike_window: int = Field(64, ge=2)
    """Steps before it that a loss is compared with."""
    spike_policy: Literal["warn", "skip", "rollback"] = "warn"
    """Tell it; leave weights as they were before the step; or go back to the newest checkpoint and
    pass over the spike's data this time."""
    spike_skip_before: int = Field(0, ge=0)
    """Steps before the spike that are passed over too after a rollback."""
    spike_skip_after: int = Field(0, ge=0)
    """Steps after it, likewise."""
    max_rollbacks: int = Field(10, ge=0)
    """Of one run; one more ends it with an error."""


class ResilienceConfig(Section):
    """When a supervised run (`mvlm submit`, `mvlm supervise`) has failed, and what is done then."""

    beat_s: float = Field(1.0, gt=0)
    """Seconds between the news of each node."""
    node_timeout_s: float = Field(30.0, gt=0)
    """Silence after which a node is given up and its ranks end themselves; at least 4 `beat_s`."""
    hang_timeout_s: float = Field(300.0, gt=0)
    """Longest time in which no rank enters another part of a step."""
    start_timeout_s: float = Field(1800.0, gt=0)
    """The same before the first step, and while a checkpoint is written or the model validated."""
    max_restarts: int = Field(10, ge=0)
    """Restarts in a row, without the run getting further than ever before."""
    crash_loop: int = Field(3, gt=0)
    """Failures with the same error at the same step that end the job, with a diagnosis."""

    @model_validator(mode="after")
    def _check(self) -> ResilienceConfig:
        if self.node_timeout_s < 4 * self.beat_s:
            raise ValueError(
                f"resilience.node_timeout_s {self.node_timeout_s:g} is less than four times "
                f"beat_s {self.beat_s:g}: a little delay would cost a node; raise it"
            )
        return self


class RunConfig(Section):
    """A whole run."""

    run_dir: str = "runs/default"
    """Folder of everything the run leaves behind; one that holds a checkpoint is resumed."""
    model: ModelConfig
    """The model: in a recipe, its name in configs/models/ or a mapping with `base: NAME`."""
    training: TrainingConfig
    """Length, batch, precision, seed."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    parallel: ParallelConfig = ParallelConfig()
    """The language model's mesh."""
    vision_parallel: VisionParallelConfig = VisionParallelConfig()
    """How the encoder's work is shared out."""
    recompute: RecomputeConfig = RecomputeConfig()
    """Activation recompute."""
    data: DataConfig = DataConfig()
    """Data sets and packing."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and loading."""
    guard: GuardConfig = GuardConfig()
    """Loss spikes."""
    resilience: ResilienceConfig = ResilienceConfig()
    """Watching and restarting."""
