"""What walks over a batch's logits in chunks of positions, so that [B, T, V] is never held, has in common.

The head's product is made chunk by chunk, forward and again backward. Positions that nobody asked for are sorted to the
end of their row and never computed; the head's gradient accumulates in f32 (a bf16 accumulator is 2 % off).
"""

import jax
import jax.numpy as jnp

from jaxpost.types import Array, record


@record
class Order:
    """int32[B, T] each: positions of every row, the scored ones first; and the place of each in it."""

    positions: Array
    places: Array


def plan(scored, width):
    """Order that puts the scored positions of each row first, and how many chunks of `width` a row hold any."""
    # Counted, not sorted: the TPU compiler takes many seconds over every sort.
    scored_before, others_before = (jnp.cumsum(x, axis=1, dtype=jnp.int32) - 1 for x in (scored, ~scored))
    longest = scored.sum(1, dtype=jnp.int32)
    places = jnp.where(scored, scored_before, longest[:, None] + others_before)
    row, index = (jax.lax.broadcasted_iota(jnp.int32, scored.shape, axis) for axis in (0, 1))
    positions = jnp.zeros(scored.shape, jnp.int32).at[row, places].set(index, unique_indices=True)
    return Order(positions, places), (longest.max() + width - 1) // width


def permute(x, order, width):
    """x [B, T, ...] in sorted order, padded along T to a multiple of width."""
    index = order.positions.reshape(order.positions.shape + (1,) * (x.ndim - 2))
    x = jnp.take_along_axis(x, index, axis=1)
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % width)] + [(0, 0)] * (x.ndim - 2))


def restore(x, order):
    """The reverse of `permute`."""
    index = order.places.reshape(order.places.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x[:, : index.shape[1]], index, axis=1)


def take(x, i, width):
    """Chunk i of x [B, T, ...], flat: [B * width, ...]: XLA on CPU transposes operands of three dimensions."""
    chunk = jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=1)
    return chunk.reshape(-1, *x.shape[2:])


def put(x, chunk, i, width):
    """x [B, T, ...] with its chunk i replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, chunk.reshape(x.shape[0], width, *x.shape[2:]), i * width, axis=1)


def products(h, table, bias, scale, soft_cap):
    """f32[N, V] thrice: products of the head, logits, tanh(logit / soft_cap) (None without a cap)."""
    raw = jnp.einsum("nd,vd->nv", h, table, preferred_element_type=jnp.float32)
    if bias is not None:
        raw = raw + bias.astype(jnp.float32)[None]
    z, capped = raw * scale, None
    if soft_cap is not None:
        capped = jnp.tanh(z / soft_cap)
        z = capped * soft_cap
    return raw, z, capped


def zero_gradients(sorted_hidden, weight, bias):
    """Of hidden states in sorted order, weight and bias: what `add_gradients` begins with."""
    d_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    return jnp.zeros_like(sorted_hidden), jnp.zeros(weight.shape, jnp.float32), d_bias


def add_gradients(grads, i, width, dz, capped, h, table, scale):
    """grads with those of chunk i, whose logits (over scale, behind the cap) have the gradient dz [N, V]."""
    d_hidden, d_weight, d_bias = grads
    if capped is not None:
        dz = dz * (1 - capped * capped)
    dz = (dz * scale).astype(table.dtype)
    d_weight = d_weight + jnp.einsum("nv,nd->vd", dz, h, preferred_element_type=jnp.float32)
    d_h = jnp.einsum("nv,vd->nd", dz, table, preferred_element_type=jnp.float32).astype(table.dtype)
    if d_bias is not None:
        d_bias = d_bias + dz.astype(jnp.float32).sum(0)
    return put(d_hidden, d_h, i, width), d_weight, d_bias


def finished_gradients(grads, order, weight, bias):
    """(of the hidden states as they came, of the weight and of the bias in their types)."""
    d_hidden, d_weight, d_bias = grads
    return restore(d_hidden, order), d_weight.astype(weight.dtype), None if bias is None else d_bias.astype(bias.dtype)
