"""From tokens of packed rows to completions and back: sums over (segment, branch), values of each at its tokens."""

import jax
import jax.numpy as jnp

from jaxpost.types import Array, Rows


def completion_sums(values: Array, rows: Rows, documents: int, branches: int) -> Array:
    """Sum of values [B, T] over each completion: [B, M, N] for M documents a row and N branches.

    Tokens of branch 0 (prompts) and of empty places belong to no completion.
    """
    return _by_completion(jax.ops.segment_sum, values, rows, documents, branches)


def completion_ends(rows: Rows, documents: int, branches: int) -> Array:
    """int32[B, M, N]: the place in its row of each completion's last token, 0 where there is no completion."""
    places = jnp.broadcast_to(jnp.arange(rows.tokens.shape[1], dtype=jnp.int32), rows.tokens.shape)
    return jnp.maximum(_by_completion(jax.ops.segment_max, places, rows, documents, branches), 0)


def at_tokens(values: Array, rows: Rows) -> Array:
    """Values [B, M, N] of completions at their tokens: [B, T], 0 at tokens that belong to none."""
    documents, branches = values.shape[1:]
    flat = jnp.pad(values.reshape(values.shape[0], -1), ((0, 0), (0, 1)))
    return jnp.take_along_axis(flat, _completion_of(rows, documents, branches), axis=1)


def token_index(scored: Array, rows: Rows, documents: int, branches: int) -> Array:
    """f32[B, T]: scored tokens of its completion before each. scored: 1 or 0 [B, T], 1 in completions alone."""
    counts = completion_sums(scored, rows, documents, branches)
    flat = counts.reshape(counts.shape[0], -1)
    before = (jnp.cumsum(flat, axis=1) - flat).reshape(counts.shape)  # completions stand in this order in a row
    return jnp.cumsum(scored, axis=1) - scored - at_tokens(before, rows)


def _completion_of(rows: Rows, documents: int, branches: int) -> Array:
    """int32[B, T]: number of the completion of each token in its row, documents * branches where there is none."""
    inside = (rows.segments > 0) & (rows.branches > 0)
    index = (rows.segments - 1) * branches + rows.branches - 1
    return jnp.where(inside, index, documents * branches)


def _by_completion(reduce, values: Array, rows: Rows, documents: int, branches: int) -> Array:
    """values [B, T] reduced over each completion: [B, M, N]."""
    index = _completion_of(rows, documents, branches)  # one past the end: dropped below

    def of_row(value, index):
        return reduce(value, index, documents * branches + 1)[:-1]

    found = jax.vmap(of_row)(values, index)
    return found.reshape(values.shape[0], documents, branches)
