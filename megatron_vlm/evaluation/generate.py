"""Greedy answers from one process, whatever layout trained the checkpoint.

Questions are packed side by side like training samples and every token is decoded from a full
forward pass: no cache of keys and values, so exactly the code that trains is what answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vlm.checkpoint.chat import read_template
from megatron_vlm.checkpoint.checkpointer import Progress, load_model
from megatron_vlm.checkpoint.folder import TOKENIZER, find_checkpoint
from megatron_vlm.config import ParallelConfig, RecomputeConfig, RunConfig, load_recipe
from megatron_vlm.data.chat import encode_prompt
from megatron_vlm.data.chat_template import ChatTemplate, end_ids
from megatron_vlm.data.geometry import grid, num_image_tokens, target_size
from megatron_vlm.data.pictures import decode_picture, patches
from megatron_vlm.data.positions import multimodal_positions, segment_positions
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.models.initialize import initialize
from megatron_vlm.models.language.packing import PackedRows
from megatron_vlm.models.vlm import VisionLanguageModel, build_model
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.platform.distributed import free_port
from megatron_vlm.topology.layout import resolve_layout
from megatron_vlm.topology.mesh import Topology, build_topology, destroy_topology


@dataclass(frozen=True)
class Question:
    """One prompt and the encoded pictures it refers to."""

    text: str
    pictures: tuple[bytes, ...] = ()
    """Files as they are on disk (PNG, JPEG, ...)."""
    names: tuple[str, ...] = ()
    """What errors call the pictures; empty for their numbers."""
    system: str | None = None
    """System prompt; null: there is none."""
    thinks: bool | None = None
    """Whether it is told to think first, or not to; null: neither."""

    def name(self, number: int) -> str:
        """What errors call picture `number`, from 0."""
        return self.names[number] if self.names else f"picture {number + 1}"


@dataclass
class _Prompt:
    ids: list[int]
    """Token ids, each picture as its number of placeholders."""
    features: torch.Tensor
    """[picture tokens, hidden]."""
    places: NDArray[np.int64]
    """[picture tokens] where they stand in `ids`."""
    counts: list[int] = field(default_factory=list)
    """Tokens of each picture."""
    columns: list[int] = field(default_factory=list)
    """Tokens along the width of each."""


class Answerer:
    """A loaded model in a process group of its own; a context manager."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        checkpoint: Path | None,
        template: TemplateText | None = None,
    ) -> None:
        """Build the model of `config` in this process and fill it.

        Args:
            config: the run; its layout is replaced by one process.
            tokenizer: the one it was trained with.
            checkpoint: weights to load; null leaves the initial ones of training.seed.
            template: what questions are written by; null: the built-in format.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another model.
            DataError: the template cannot ask for answers.
        """
        self.config, self.tokenizer = _alone(config), tokenizer
        self.template = None if template is None else ChatTemplate(template, tokenizer)
        self.end_ids = end_ids(tokenizer, self.template)
        layout = resolve_layout(self.config, 1)
        device = start_distributed(World(0, 1, 0, "alone", "127.0.0.1", free_port()))
        try:
            self._load(build_topology(layout, device), checkpoint)
        except BaseException:
            # Else no other group could be started in this process.
            self.close()
            raise

    def _load(self, topology: Topology, checkpoint: Path | None) -> None:
        config, self.topology = self.config, topology
        self.model: VisionLanguageModel = build_model(config, topology)
        self.progress = Progress()
        if checkpoint is None:
            initialize(self.model.sharded_state_dict(), config.model, config.training.seed)
        else:
            self.progress = load_model(checkpoint, self.model, config)
        (self._decoder,) = self.model.chunks
        # Only the last position of each prompt goes through the output layer.
        self._decoder.output = "hidden"
        self._decoder.eval()
        if self.model.encoder is not None:
            self.model.encoder.eval()

    @classmethod
    def from_checkpoint(
        cls, path: Path, chat: TemplateText | Literal["recorded", "built-in"] = "recorded"
    ) -> Answerer:
        """Load a run folder or a checkpoint, which carry their configuration and tokenizer.

        Args:
            path: the folder.
            chat: what questions are written by: what the checkpoint carries, the built-in format
                whatever that is, or another template.

        Raises:
            CheckpointError: there is none, or it is damaged.
            DataError: its tokenizer or its template cannot serve.
        """
        found = find_checkpoint(path)
        config = load_recipe(found / "config.yaml")
        tokenizer = Tokenizer.load(found / TOKENIZER)
        if chat == "recorded":
            return cls(config, tokenizer, found, read_template(found))
        return cls(config, tokenizer, found, chat if isinstance(chat, TemplateText) else None)

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the process group."""
        destroy_topology()
        stop()

    @torch.no_grad()
    def answer(
        self,
        questions: Sequence[Question],
        max_new_tokens: int = 64,
        batch_tokens: int = 4096,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[str]:
        """The most likely answer to each question, token by token.

        Args:
            questions: prompts with their pictures.
            max_new_tokens: longest answer; one that reaches the model's longest sample
                (max_position_embeddings, prompt included) ends there.
            batch_tokens: tokens packed into one forward pass, answers included.
            on_batch: told how many more questions are done.

        Raises:
            ConfigError: `max_new_tokens` is below 1.
            DataError: a picture cannot be read, or a prompt is longer than the model allows.
        """
        if max_new_tokens < 1:
            raise ConfigError(
                f"longest answer of {max_new_tokens} tokens: expected 1 or more (--max-new-tokens)"
            )
        prompts = [self._prompt(question) for question in questions]
        answers: list[str] = []
        start = 0
        while start < len(prompts):
            stop_at = start + 1
            total = len(prompts[start].ids) + max_new_tokens
            while stop_at < len(prompts):
                total += len(prompts[stop_at].ids) + max_new_tokens
                if total > batch_tokens:
                    break
                stop_at += 1
            answers += self._decode(prompts[start:stop_at], max_new_tokens)
            if on_batch is not None:
                on_batch(stop_at - start)
            start = stop_at
        return answers

    @torch.no_grad()
    def logits(
        self, prompts: Sequence[Question | Sequence[int]]
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Scores of the next token after every token of each prompt, from one forward pass.

        Args:
            prompts: questions, encoded as `answer` does, or token ids without pictures.

        Returns:
            For each: its ids, pictures as their placeholders, and logits `[tokens, vocabulary]`
            in the model's precision, on the host. The vocabulary is the tokenizer's.

        Raises:
            DataError: a picture cannot be read, or a prompt is longer than the model allows.
        """
        encoded = [
            self._prompt(prompt) if isinstance(prompt, Question) else self._tokens(prompt)
            for prompt in prompts
        ]
        hidden, bounds = self._hidden(encoded, [[] for _ in encoded])
        scores = self._scores(hidden).cpu()
        return [
            (prompt.ids, scores[start:end])
            for prompt, start, end in zip(encoded, bounds, bounds[1:], strict=False)
        ]

    def _tokens(self, ids: Sequence[int]) -> _Prompt:
        hidden = self.config.model.language.hidden_size
        return _Prompt(list(ids), torch.zeros(0, hidden), np.zeros(0, dtype=np.int64))

    def _prompt(self, question: Question) -> _Prompt:
        vision, encoder = self.config.model.vision, self.model.encoder
        ids = self._question_ids(question)
        hidden = self.config.model.language.hidden_size
        features = torch.zeros(0, hidden)
        counts: list[int] = []
        widths: list[int] = []
        if question.pictures:
            if vision is None or encoder is None:
                raise DataError("the model has no encoder; expected a question without pictures")
            pixels, grids = [], []
            for number, encoded in enumerate(question.pictures):
                try:
                    image = decode_picture(encoded)
                    height, width = target_size(image.shape[0], image.shape[1], vision)
                except DataError as error:
                    raise DataError(f"{question.name(number)}: {error}") from error
                rows, columns = grid(height, width, vision)
                pixels.append(torch.from_numpy(patches(image, rows, columns, vision)))
                grids.append((rows, columns))
                counts.append(num_image_tokens(rows, columns, vision))
                widths.append(columns // vision.spatial_merge_size)
            parameter = next(encoder.parameters())
            features = encoder(
                torch.cat(pixels).to(parameter), torch.tensor(grids, device=parameter.device)
            )
        expanded, places = _expand(ids, counts, self.tokenizer.image_id)
        limit = self.config.model.language.max_position_embeddings
        if len(expanded) >= limit:
            raise DataError(
                f"the prompt has {len(expanded)} tokens with its pictures; expected fewer than "
                f"max_position_embeddings {limit}: use smaller pictures or a shorter text"
            )
        return _Prompt(expanded, features, places, counts, widths)

    def _question_ids(self, question: Question) -> list[int]:
        """Ids of a question, each picture as one placeholder, and of what opens its answer."""
        text, pictures = question.text, len(question.pictures)
        if self.template is None:
            return encode_prompt(
                self.tokenizer, text, pictures, system=question.system, thinks=question.thinks
            )
        return self.template.prompt(text, pictures, system=question.system, thinks=question.thinks)

    def _decode(self, prompts: Sequence[_Prompt], max_new_tokens: int) -> list[str]:
        ends = self.end_ids
        limit = self.config.model.language.max_position_embeddings
        rooms = [min(max_new_tokens, limit - len(prompt.ids)) for prompt in prompts]
        given: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        while active:
            # Those that have ended leave the batch.
            chosen = self._next_tokens([prompts[i] for i in active], [given[i] for i in active])
            for i, token in zip(active, chosen, strict=True):
                given[i].append(token)
            active = [i for i in active if given[i][-1] not in ends and len(given[i]) < rooms[i]]
        return [self.tokenizer.decode([t for t in ids if t not in ends]) for ids in given]

    def _next_tokens(self, prompts: list[_Prompt], given: list[list[int]]) -> list[int]:
        hidden, bounds = self._hidden(prompts, given)
        last = hidden[torch.from_numpy(bounds[1:] - 1).to(hidden.device)]
        return self._scores(last).argmax(dim=-1).tolist()

    def _hidden(
        self, prompts: list[_Prompt], given: list[list[int]]
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The decoder's states `[tokens, hidden]` of all prompts, and where each prompt begins."""
        device = self.topology.device
        lengths = [len(p.ids) + len(g) for p, g in zip(prompts, given, strict=True)]
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        tokens = [t for p, g in zip(prompts, given, strict=True) for t in (*p.ids, *g)]
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32)).to(device)
        rows = PackedRows(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            position_ids=torch.from_numpy(segment_positions(bounds)).to(device),
        )
        if self.config.model.language.mrope_section is not None:
            self._add_positions(rows, prompts, bounds)
        places = [p.places + start for p, start in zip(prompts, bounds, strict=False)]
        ids = torch.tensor(tokens, device=device).unsqueeze(0)
        features = torch.cat([p.features.to(device) for p in prompts])
        where = torch.from_numpy(np.concatenate(places)).to(device)
        decoder = self._decoder
        hidden = decoder(
            input_ids=ids,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder.embed(ids, features, where),
            packed_seq_params=rows,
        )
        return hidden[0], bounds

    def _add_positions(
        self, rows: PackedRows, prompts: list[_Prompt], bounds: NDArray[np.int64]
    ) -> None:
        spans = []
        for prompt, start in zip(prompts, bounds.tolist(), strict=False):
            first = np.cumsum([0, *prompt.counts])[:-1]
            spans += [
                (start + int(prompt.places[place]), count)
                for place, count in zip(first, prompt.counts, strict=True)
            ]
        columns = [column for prompt in prompts for column in prompt.columns]
        found = multimodal_positions(
            bounds,
            np.asarray(spans, np.int64).reshape(-1, 2),
            np.asarray(columns, np.int64),
        )
        device = self.topology.device
        rows.rotary_positions = torch.from_numpy(found).to(device)
        rows.rotary_ids = torch.arange(found.shape[1], device=device)

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[tokens, vocabulary]` of states `[tokens, hidden]`."""
        decoder = self._decoder
        tied = decoder.share_embeddings_and_output_weights
        weight = decoder.shared_embedding_or_output_weight() if tied else None
        logits, _ = decoder.output_layer(hidden.unsqueeze(1), weight=weight)
        # Rows of the embedding beyond the tokenizer's are padding: never an answer.
        return logits[:, 0, : self.tokenizer.vocab_size]


def _alone(config: RunConfig) -> RunConfig:
    """The same model in one process, in a precision that answers want."""
    training = config.training
    if training.precision.startswith("fp8"):
        # Its weights are kept in bf16, and so few tokens at a time gain nothing from fp8.
        training = training.model_copy(update={"precision": "bf16"})
    return config.model_copy(
        update={
            "parallel": ParallelConfig(),
            "recompute": RecomputeConfig(),
            "training": training,
        }
    )


def _expand(
    ids: Sequence[int], counts: Sequence[int], image_id: int
) -> tuple[list[int], NDArray[np.int64]]:
    """Repeat each placeholder as often as its picture has tokens; also where those stand."""
    expanded: list[int] = []
    remaining = iter(counts)
    for token in ids:
        expanded += [token] * (next(remaining) if token == image_id else 1)
    places = np.flatnonzero(np.asarray(expanded) == image_id).astype(np.int64)
    return expanded, places
