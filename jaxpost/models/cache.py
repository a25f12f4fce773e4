"""Keys and values of what a model has read so far: what makes the next token cheap.

Token p of a row lies in slot p modulo the number of slots, so a layer with a sliding window keeps only its window, and
which position a slot holds follows from the row's length. Rows are independent: each has a length of its own.
"""

import jax
import jax.numpy as jnp

from jaxpost.models.config import ModelConfig
from jaxpost.sharding.rules import constrain
from jaxpost.types import Array, record

SLOTS = 16  # or a multiple of this: of other numbers the TPU compiler copies the whole cache for ops.decode
AXES = ("batch", "kv_heads", "slots", "head_dim")


@record
class KV:
    """Of one layer, or of n layers [n, ...]. int8 with `scales`: absmax of each token and head over 127."""

    k: Array  # [B, K, S, h]
    v: Array  # [B, K, S, h]
    scales: tuple[Array, Array] | None  # f32[B, K, S] each, of k and of v


@record
class Cache:
    """layers: one KV a layer, or (`stacked`) one of [n, ...] layers for each kind of the pattern and of its tail."""

    layers: tuple[KV, ...]
    lengths: Array  # int32[B], tokens read


def new_cache(
    config: ModelConfig, batch: int, length: int, *, chunk: int, dtype: str, quantized: bool, stacked: bool
) -> Cache:
    """An empty cache of `length` tokens a row, to be extended by at most `chunk` tokens at once."""
    n_tail, P = config.tail_layers, len(config.pattern)
    if stacked:
        kinds = [(kind, (config.num_layers - n_tail) // P) for kind in config.pattern if config.num_layers >= P]
        kinds += [(kind, 1) for kind in config.pattern[:n_tail]]
    else:
        kinds = [(kind, None) for kind in config.layers]

    def one(kind, n):
        slots = length if kind.window is None else min(length, kind.window + chunk - 1)
        slots = slots if slots < SLOTS else -(-slots // SLOTS) * SLOTS
        shape, stack = (batch, config.num_kv_heads, slots, config.head_dim), () if n is None else (n,)
        axes = AXES if n is None else ("layers", *AXES)
        zeros = lambda shape, axes, dtype: constrain(jnp.zeros((*stack, *shape), dtype), axes)  # noqa: E731
        k, v = (zeros(shape, axes, "int8" if quantized else dtype) for _ in "kv")
        scales = tuple(zeros(shape[:-1], axes[:-1], "float32") for _ in "kv") if quantized else None
        return KV(k, v, scales)

    return Cache(tuple(one(*kind) for kind in kinds), jnp.zeros(batch, jnp.int32))


def key_positions(lengths: Array, slots: int) -> Array:
    """int32[B, S]: position of the token in each slot, after `lengths` [B] tokens; negative where it is empty."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)[None]) % slots


def extend(kv: KV, layer: Array | None, k: Array, v: Array, positions: Array) -> KV:
    """The KV with the T tokens' k and v [B, T, K, h] at their positions [B, T], those below 0 nowhere.

    layer: of a stacked KV.
    """
    batch, heads, slots = jnp.arange(len(positions))[:, None, None], jnp.arange(k.shape[2]), kv.k.shape[-2]
    at = jnp.where(positions < 0, slots, positions % slots)[:, :, None]  # out of bounds: dropped
    # Head by head: for updates that span them the TPU compiler would turn the whole cache around and back.
    index = (batch, heads, at) if layer is None else (layer, batch, heads, at)
    write = lambda old, new: old.at[index].set(new, mode="drop")  # noqa: E731
    if kv.scales is None:
        return KV(write(kv.k, k), write(kv.v, v), None)
    (k, k_scale), (v, v_scale) = _to_int8(k), _to_int8(v)
    return KV(write(kv.k, k), write(kv.v, v), (write(kv.scales[0], k_scale), write(kv.scales[1], v_scale)))


def plain(kv: KV, layer: Array | None, dtype: str) -> tuple[Array, Array]:
    """k, v [B, K, S, h] in `dtype`, of one layer of a stacked KV."""
    own = lambda x: x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)  # noqa: E731
    if kv.scales is None:
        return own(kv.k), own(kv.v)
    scaled = lambda x, s: (own(x).astype(jnp.float32) * own(s)[..., None]).astype(dtype)  # noqa: E731
    return scaled(kv.k, kv.scales[0]), scaled(kv.v, kv.scales[1])


def _to_int8(x):
    """[..., h] -> (int8[..., h], f32[...]): values over a scale of their own for each token and head."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    return jnp.round(x / jnp.where(scale == 0, 1.0, scale)[..., None]).astype(jnp.int8), scale
