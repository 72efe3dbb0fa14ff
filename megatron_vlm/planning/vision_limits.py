"""What the memory that a run grants its encoder comes to, in patches and in features.

Checked before there is a process group: a picture is encoded whole or in the parts that the balance
makes, and a micro-batch's features travel together, so there is a least memory for each.
"""

from __future__ import annotations

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.planning.activations import Device, encoder_bytes
from megatron_vlm.planning.shapes import element_bytes
from megatron_vlm.topology.layout import Layout

_GIB = 2**30


def encoder_patches(config: RunConfig, device: Device) -> int | None:
    """Patches whose activations fit `vision_parallel.activation_memory_gib`; null: no limit.

    Raises:
        ConfigError: two of the largest pictures do not fit: one that is kept, one that is encoded
            again.
    """
    given, vision = config.vision_parallel.activation_memory_gib, config.model.vision
    if given is None or vision is None:
        return None
    patch, least = patch_bytes(config, device), least_patches(config)
    if least * patch > given * _GIB:
        raise ConfigError(
            f"vision_parallel.activation_memory_gib {given:g}: two pictures of model.vision."
            f"max_pixels {vision.max_pixels} ({least // 2:,} patches each) take "
            f"{least * patch / _GIB:.3g} GiB with recompute.vision={config.recompute.vision};"
            " raise it, lower max_pixels, or set recompute.vision=full"
        )
    return int(given * _GIB / patch) if patch else None


def least_patches(config: RunConfig) -> int:
    """Patches of two of the largest pictures: one that is kept, one that is encoded again."""
    vision = config.model.vision
    return 0 if vision is None else 2 * (vision.max_pixels // vision.patch_size**2)


def patch_bytes(config: RunConfig, device: Device, elsewhere: float = 0.0) -> float:
    """Bytes for one patch, kept or while it is computed again.

    Args:
        config: the run.
        device: what computes.
        elsewhere: patches of the same picture that other ranks encode.
    """
    saved = encoder_bytes(
        config.model,
        1,
        element_bytes(config.training.precision),
        config.recompute,
        device,
        config.training.freeze,
        elsewhere,
    )
    return saved.kept + saved.recomputed


def window_features(config: RunConfig, layout: Layout) -> int | None:
    """Features of a window that fit `vision_parallel.feature_memory_gib`; null: no limit.

    Those of one window are in use while the next one's arrive.

    Raises:
        ConfigError: those of two micro-batches that are nothing but pictures do not fit.
    """
    given = config.vision_parallel.feature_memory_gib
    if given is None or config.model.vision is None:
        return None
    feature = config.model.language.hidden_size * element_bytes(config.training.precision)
    parts = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    tokens = config.training.seq_length * config.training.micro_batch_size // parts
    if 2 * tokens * feature > given * _GIB:
        raise ConfigError(
            f"vision_parallel.feature_memory_gib {given:g}: the features of two micro-batches of "
            f"{tokens:,} tokens on a rank take {2 * tokens * feature / _GIB:.3g} GiB; raise it, or "
            "lower training.micro_batch_size or training.seq_length"
        )
    return int(given * _GIB / 2 / feature)
