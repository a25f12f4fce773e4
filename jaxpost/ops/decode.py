"""Attention of a few new tokens to the cache: a Pallas kernel for TPU.

What `attention.cached_attention` computes over all slots of the cache is here one pass over the blocks of slots that a
row needs, with a running maximum and sum (arXiv:2205.14135): blocks that are empty or out of the window are neither
computed nor fetched, keys and values in int8 are read as such, and of a stacked cache the kernel reads the layer in
place. All key heads of a row stand in one block, so that a step moves about a MiB and scales [K, S] need no other
layout.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpost.types import Array

STEP_BYTES = 1 << 20  # of keys and values a step: moving them should take longer than what a step costs by itself
BLOCKS = (128, 2048)  # fewest and most slots of a block
MOST_SCORES = 1 << 19  # f32 of a step: they, their exponentials and their mask have to fit into VMEM with the rest
UNSEEN = -1e30  # finite, so that a query that sees nothing gives no NaN


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    lengths: Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    scales: tuple[Array, Array] | None = None,
    layer: Array | None = None,
    interpret: bool = False,
) -> Array:
    """`cached_attention` [B, T, H, h] of T new tokens to a cache that holds them too, where T is small.

    Token p of a row lies in slot p modulo S (models/cache.py), so lengths say which position a slot holds. The output
    of a query below 0 is finite and means nothing. Over a mesh: inside a shard_map over rows and heads, with
    check_vma=False. Any shape is right, but where S is no multiple of 8 or h none of 128, the TPU compiler may lay the
    cache out otherwise and copy all of it for the kernel.

    Args:
      q: [B, T, H, h]; query head n reads key head n // (H / K).
      k, v: [B, K, S, h] in the type of q, or int8 with `scales`.
      positions: int32[B, T], those of the new tokens; below 0 where there is none.
      lengths: int32[B], tokens of each row, the new ones included.
      scale, window, soft_cap: as in `attention`.
      scales: f32[B, K, S] of k and of v, which int8 is multiplied by.
      layer: int32[], of a stacked cache: k, v [n, B, K, S, h], scales [n, B, K, S].
      interpret: without a TPU, slowly: for tests.
    """
    if layer is None:
        k, v, scales = jax.tree.map(lambda x: x[None], (k, v, scales))
    B, T, H, h = q.shape
    K, S = k.shape[2:4]
    if k.shape != v.shape or k.shape[1] != B or k.shape[4] != h or H % K:
        raise ValueError(
            f"decode_attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit [B, T, H, h], [B, K, S, h]"
        )
    G, rows = H // K, T * (H // K)
    block = block_slots(S, 2 * K * h * k.dtype.itemsize, K * rows)
    blocks = -(-S // block)
    nearest, first, count = visits(positions, lengths, S, block, window)
    q = q.reshape(B, T, K, G, h).swapaxes(1, 2).reshape(B, K, rows, h)
    at = jnp.repeat(positions, G, axis=1)[:, :, None]

    def needed(b, j, layer, nearest, first, count, lengths):
        """The block of step j: the row's last steps have work; in those before them its first block arrives."""
        block = first[nearest[b]] + jnp.maximum(j - (blocks - count[b]), 0)
        return layer[0], nearest[b], 0, jnp.where(block >= blocks, block - blocks, block)

    own = lambda b, j, *scalars: (b, 0, 0)  # noqa: E731
    whole = pl.BlockSpec((None, K, rows, h), lambda b, j, *scalars: (b, 0, 0, 0))
    slots = pl.BlockSpec((None, None, K, block, h), lambda *args: (*needed(*args), 0))
    scale_specs = [pl.BlockSpec((None, None, K, block), needed)] * (0 if scales is None else 2)
    kernel = functools.partial(_kernel, S=S, scale=scale, window=window, soft_cap=soft_cap, scaled=scales is not None)
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B, blocks),
            in_specs=[whole, pl.BlockSpec((None, rows, 1), own), slots, slots, *scale_specs],
            out_specs=whole,
            scratch_shapes=[pltpu.VMEM((K, rows, width), jnp.float32) for width in (1, 1, h)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(q, k, scales),
        interpret=interpret,
        name="decode_attention",
    )(
        jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        nearest,
        first,
        count,
        lengths,
        q,
        at,
        k,
        v,
        *(scales or ()),
    )
    return out.reshape(B, K, T, G, h).swapaxes(1, 2).reshape(B, T, H, h)


def block_slots(slots: int, slot_bytes: int, rows: int) -> int:
    """Slots of a block: as many as make about STEP_BYTES, a power of two, no more than there are.

    slot_bytes: of keys and values of a slot, all heads. rows: query rows of all key heads, each with a score a slot.
    """
    few, most = BLOCKS
    fitting = min(STEP_BYTES // slot_bytes, MOST_SCORES // (8 * -(-rows // 8)))
    return min(slots, max(few, min(most, 1 << int(math.log2(max(fitting, 1))))))


def visits(positions: Array, lengths: Array, slots: int, block: int, window: int | None):
    """Which blocks of its ring each row needs: `count` ones from block `first` on, around the ring's end.

    Returns int32[B] each: (nearest, first, count). nearest: the row itself, or for one that needs nothing the next row
    that does, whose first block the idle steps may fetch already.
    """
    blocks, last = -(-slots // block), lengths - 1
    some = positions >= 0
    newest = jnp.minimum(positions.max(axis=1), last)
    oldest = jnp.maximum(last - (slots - 1), 0)
    if window is not None:
        nearest_query = jnp.where(some, positions, jnp.iinfo(jnp.int32).max).min(axis=1)
        oldest = jnp.maximum(oldest, nearest_query - (window - 1))
    first, end = oldest % slots // block, newest % slots // block
    around = (newest % slots < oldest % slots).astype(jnp.int32)
    # Where both ends lie in one block and the ring's end between them, that block is needed once.
    count = jnp.where(newest < oldest, 0, jnp.minimum(end - first + 1 + around * blocks, blocks))
    rows = jnp.arange(len(lengths), dtype=jnp.int32)
    nearest = jax.lax.cummin(jnp.where(count > 0, rows, len(lengths) - 1), reverse=True)
    return nearest, first, count


def _kernel(layer, nearest, first, count, lengths, q, at, k, v, *refs, S, scale, window, soft_cap, scaled):
    """One block of slots of one row: q [K, R, h], at [R, 1], k, v [K, block, h], scales [K, block] each."""
    *scales, out, highest, total, weighted = refs
    row, step, blocks = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    nth = step - (blocks - count[row])

    @pl.when(step == 0)
    def _():
        highest[...] = jnp.full_like(highest, UNSEEN)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(nth >= 0)
    def _():
        dtype, block = q.dtype, k.shape[1]
        index = first[row] + nth
        index = jnp.where(index >= blocks, index - blocks, index)
        slot = jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) + index * block
        # The newest token's slot divides the ring: those after it hold tokens from a round before.
        newest = lengths[row] - 1
        newest_slot = jax.lax.rem(newest, S)
        key_at = slot + (newest - newest_slot) - jnp.where(slot > newest_slot, S, 0)
        distance = at[...] - key_at
        seen = (distance >= 0) & (key_at >= 0) & (slot < S)
        if window is not None:
            seen &= distance < window
        scores = _product(q[...], k[...].astype(dtype), 2) * scale
        if scaled:
            scores *= scales[0][...][:, None, :]
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(seen[None], scores, UNSEEN)
        before = highest[...]
        now = jnp.maximum(before, scores.max(axis=2, keepdims=True))
        probs, kept = jnp.exp(scores - now), jnp.exp(before - now)
        highest[...] = now
        total[...] = total[...] * kept + probs.sum(axis=2, keepdims=True)
        values = v[...].astype(dtype)
        if scaled:
            probs *= scales[1][...][:, None, :]
        if S % block:  # what lies beyond the last slot is anything, NaN too
            inside = jax.lax.broadcasted_iota(jnp.int32, (1, block, 1), 1) + index * block < S
            values, probs = jnp.where(inside, values, 0), jnp.where((slot < S)[None], probs, 0)
        weighted[...] = weighted[...] * kept + _product(probs.astype(dtype), values, 1)

    @pl.when(step == blocks - 1)
    def _():
        # A row that needed no block has no sum: it gives zeros.
        out[...] = (weighted[...] / jnp.where(total[...] == 0, 1.0, total[...])).astype(out.dtype)


def _product(a, b, over):
    """f32[K, R, n] of a [K, R, m] and b: a sum over the last axis of a and axis `over` of b."""
    return jax.lax.dot_general(a, b, (((2,), (over,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _cost(q, k, scales):
    """Of rows that fill their slots; what is skipped is not known when compiling."""
    pairs = math.prod(q.shape[:3]) * k.shape[3]
    layer_bytes = 2 * k.size * k.dtype.itemsize // len(k)
    layer_bytes += 0 if scales is None else 2 * scales[0].size * 4 // len(k)
    return pl.CostEstimate(
        flops=4 * pairs * q.shape[3],
        bytes_accessed=layer_bytes + 2 * q.size * q.dtype.itemsize,
        transcendentals=pairs,
    )
