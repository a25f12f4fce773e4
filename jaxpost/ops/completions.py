"""From tokens of packed rows to completions: sums over (segment, branch)."""

import jax
import jax.numpy as jnp

from jaxpost.types import Array, Rows


def completion_sums(values: Array, rows: Rows, documents: int, branches: int) -> Array:
    """Sum of values [B, T] over each completion: [B, M, N] for M documents a row and N branches.

    Tokens of branch 0 (prompts) and of empty places belong to no completion.
    """
    inside = (rows.segments > 0) & (rows.branches > 0)
    index = (rows.segments - 1) * branches + rows.branches - 1
    index = jnp.where(inside, index, documents * branches)  # one past the end: dropped below

    def of_row(value, index):
        return jax.ops.segment_sum(value, index, documents * branches + 1)[:-1]

    sums = jax.vmap(of_row)(values, index)
    return sums.reshape(values.shape[0], documents, branches)
