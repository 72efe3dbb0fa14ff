"""A Hugging Face folder as the tensors a model wants: names checked, float8 multiplied out."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_vlm.config import ModelConfig
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf.names import Translation
from megatron_vlm.models.hf.tensors import EXPERT_BIAS
from megatron_vlm.release.dtypes import CHOICES
from megatron_vlm.release.fp8 import BlockScaled
from megatron_vlm.release.safetensors_reader import DTYPES, SafetensorsFolder

DTYPE_CHOICES: dict[str, torch.dtype | None] = {
    name: None if name == "keep" else getattr(torch, name) for name in CHOICES
}
"""What weights become, by the name of the choice."""

_COMPARED_BYTES = 1 << 22
_CONVERTED_BYTES = 1 << 22


class Source:
    """What a translation needs of a folder, of which it must be the whole."""

    def __init__(
        self, folder: SafetensorsFolder, translation: Translation, config: dict[str, Any], name: str
    ) -> None:
        """Hold the folder's headers against the translation.

        Args:
            folder: the tensors.
            translation: what the model is made of.
            config: config.json.
            name: what errors call it.

        Raises:
            ConversionError: a tensor is missing, left over, misshapen or of a dtype that holds no
                weights.
        """
        self._folder, self._translation = folder, translation
        self._scaled = BlockScaled(folder, config, name)
        wanted = dict(translation.theirs)
        there = folder.entries.keys() - self._scaled.scales
        for copy in translation.copies:
            if copy.name in there:
                wanted[copy.name] = wanted[copy.of]
        self._compare(wanted, there, name)

    def _compare(self, wanted: dict[str, Any], there: set[str], name: str) -> None:
        path = self._folder.path
        missing = [tensor for tensor in wanted if tensor not in there]
        if missing:
            raise ConversionError(
                f"{path}: {missing[0]} is missing{_more(missing)}, while {name} describes a model "
                f"that has it{_prediction_hint(missing, wanted)}; nothing was written"
            )
        extra = sorted(there - wanted.keys())
        if extra:
            raise ConversionError(
                f"{path}: {extra[0]} has no place{_more(extra)} in the model that {name} "
                "describes; nothing was written"
            )
        for tensor, shape in wanted.items():
            entry = self._folder.entries[tensor]
            if entry.shape != shape:
                raise ConversionError(
                    f"{path / entry.file}: {tensor} is {list(entry.shape)}; expected "
                    f"{list(shape)} after {name}; nothing was written"
                )
            if entry.dtype not in DTYPES:
                raise ConversionError(
                    f"{path / entry.file}: {tensor} is {entry.dtype}; expected one of "
                    f"{', '.join(DTYPES)}; nothing was written"
                )

    def dtype(self, name: str, float8: torch.dtype = torch.bfloat16) -> torch.dtype:
        """What a tensor is kept in; of float8, what it is multiplied out to."""
        return float8 if name in self._scaled.names else DTYPES[self._folder.entries[name].dtype]

    def place(self, name: str) -> str:
        """What errors call a tensor: its file and its name."""
        return f"{self._folder.path / self._folder.entries[name].file}: {name}"

    def our_dtype(self, key: str, sources: list[str], dtype: torch.dtype | None) -> torch.dtype:
        """The dtype that one of our tensors gets.

        Args:
            key: its name.
            sources: their tensors in it.
            dtype: what weights become; null: what they are.

        Raises:
            ConversionError: its parts differ in dtype and are to be kept as they are.
        """
        if dtype is not None:
            # Training keeps it in float32 and rounds it nowhere.
            return torch.float32 if key.endswith(EXPERT_BIAS) else dtype
        first = self.dtype(sources[0])
        for name in sources:
            if self.dtype(name) != first:
                raise ConversionError(
                    f"{name} is {self.dtype(name)} and {sources[0]} is {first}, which are one "
                    "tensor here; give the dtype with --dtype; nothing was written"
                )
        return first

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` `[count]` with a tensor's elements from `start` on, rounded to its dtype."""
        if name in self._scaled.names:
            self._scaled.read(name, start, out)
            return
        stored = self.dtype(name)
        if stored == out.dtype:
            self._folder.read(name, start, out)
            return
        # A little at a time: what is read lies beside what it becomes, and may be wider.
        step = _CONVERTED_BYTES // stored.itemsize
        for done in range(0, out.numel(), step):
            part = torch.empty(min(step, out.numel() - done), dtype=stored)
            self._folder.read(name, start + done, part)
            out[done : done + part.numel()] = part

    def check_copies(self) -> None:
        """Refuse a tensor that should repeat another and does not.

        Raises:
            ConversionError: it differs.
        """
        for copy in self._translation.copies:
            if copy.name in self._folder.entries:
                self._check_copy(copy.name, copy.of)

    def _check_copy(self, name: str, of: str) -> None:
        one, other = self._folder.entries[name], self._folder.entries[of]
        same, total = one.dtype == other.dtype, math.prod(one.shape)
        dtype = self.dtype(name)
        one_size = _COMPARED_BYTES // dtype.itemsize
        for start in range(0, total if same else 0, one_size):
            count = min(one_size, total - start)
            parts = [torch.empty(count, dtype=dtype) for _ in range(2)]
            self.read(name, start, parts[0])
            self.read(of, start, parts[1])
            # As bytes: 0 equals -0 as a number.
            same = torch.equal(*(part.view(torch.uint8) for part in parts))
            if not same:
                break
        if not same:
            raise ConversionError(
                f"{self._folder.path / one.file}: {name} differs from {of}, which it must repeat: "
                "the model has one for both; nothing was written"
            )


def check_counts(model: ModelConfig, folder: SafetensorsFolder, name: str) -> None:
    """Refuse more layers, experts or heads than a folder's headers have room for.

    A plan takes time and memory for each of them, so what config.json claims is held against the
    files first: each layer and each expert has a tensor of its own, each head a row of one.

    Args:
        model: what is to be planned.
        folder: the tensors.
        name: what errors call config.json.

    Raises:
        ConversionError: they are too many.
    """
    language = model.language
    layers = language.num_layers
    experts = (language.num_moe_experts or 0) * (layers - language.first_k_dense_replace)
    tensors = len(folder.entries)
    rows = max((size for entry in folder.entries.values() for size in entry.shape), default=0)
    for what, value, needed, there, unit in (
        ("num_hidden_layers", layers, layers, tensors, "tensors"),
        ("n_routed_experts", language.num_moe_experts, experts, tensors, "tensors"),
        ("num_attention_heads", language.num_attention_heads, language.query_groups, rows, "rows"),
        (
            "vision_config: num_hidden_layers",
            model.vision and model.vision.num_layers,
            model.vision.num_layers if model.vision else 0,
            tensors,
            "tensors",
        ),
    ):
        if needed > there:
            raise ConversionError(
                f"{name}: {what} is {value}, which takes {needed:,} {unit} or more, but "
                f"{folder.path} has {there:,} at most; expected the config.json of these files; "
                "nothing was written"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more, up to {names[-1]})" if len(names) > 1 else ""


def _prediction_hint(missing: list[str], wanted: dict[str, Any]) -> str:
    """transformers drops the layers of multi-token prediction when it saves."""
    layer = missing[0].rpartition(".layers.")[2].partition(".")[0]
    prefix = f"model.layers.{layer}."
    ours = [name for name in wanted if name.startswith(prefix)]
    if f"{prefix}eh_proj.weight" in ours and set(ours) <= set(missing):
        return (
            " (saving with transformers leaves out multi-token prediction; set "
            "num_nextn_predict_layers to 0 to do without)"
        )
    return ""
