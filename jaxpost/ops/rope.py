"""Rotary position embedding (RoFormer, arXiv:2104.09864), in the half-split layout of Hugging Face."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jaxpost.types import Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which angles: `kind` says how the frequencies are stretched for long contexts.

    default: theta^(-2i/h). linear: those over `factor` (arXiv:2306.15595). llama3: wavelengths longer than
    original_max_positions / low_freq_factor over `factor`, shorter than original_max_positions / high_freq_factor
    kept, between them a linear blend (Llama 3.1, arXiv:2407.21783).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position, f32[h / 2]. Raises ValueError on an unknown kind."""
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        periods = rope.original_max_positions * frequencies / (2 * math.pi)  # turns within the original context
        keep = (periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        frequencies = keep * frequencies + (1 - keep) * frequencies / rope.factor
    elif rope.kind != "default":
        raise ValueError(f"unknown RoPE kind {rope.kind!r}; known: default, linear, llama3")
    return frequencies.astype(np.float32)


def rope_tables(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """(cos, sin), f32[B, T, h / 2] each, of positions int32[B, T]. Made once a step, shared by all layers."""
    angles = positions.astype(jnp.float32)[:, :, None] * inverse_frequencies(rope, head_dim)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates x [B, T, N, h] by the tables, in f32; the result has the type of x."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
