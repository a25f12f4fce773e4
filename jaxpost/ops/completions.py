"""From tokens of packed rows to completions: sums over (segment, branch)."""

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


def _by_completion(reduce, values: Array, rows: Rows, documents: int, branches: int) -> Array:
    """values [B, T] reduced over each completion: [B, M, N]."""
    inside = (rows.segments > 0) & (rows.branches > 0)
    index = (rows.segments - 1) * branches + rows.branches - 1
    index = jnp.where(inside, index, documents * branches)  # one past the end: dropped below

    def of_row(value, index):
        return reduce(value, index, documents * branches + 1)[:-1]

    found = jax.vmap(of_row)(values, index)
    return found.reshape(values.shape[0], documents, branches)
