"""Statistics of the places where a mask is 1, and of where its runs of 1 go on and end."""

import jax.numpy as jnp

from jaxpost.types import Array

EPSILON = 1e-8  # added to a variance before its root is divided by


def moments(values: Array, mask: Array) -> tuple[Array, Array]:
    """Mean and unbiased variance (n - 1) over all places of a mask, f32[] each; 0 where they have none."""
    count = mask.sum()
    mean = jnp.where(mask > 0, values, 0.0).sum() / jnp.maximum(count, 1.0)
    squares = jnp.where(mask > 0, (values - mean) ** 2, 0.0).sum()
    return mean, squares / jnp.maximum(count - 1, 1.0)


def whiten(values: Array, mask: Array, *, shift_mean: bool = True) -> Array:
    """(values - mean) / std over a mask, 0 outside it. shift_mean=False: scaled about the mean, which stays."""
    mean, variance = moments(values, mask)
    scaled = (values - mean) / jnp.sqrt(variance + EPSILON)
    return jnp.where(mask > 0, scaled if shift_mean else scaled + mean, 0.0)


def continues(mask: Array) -> Array:
    """f32[..., T]: 1 where this place and the next are both in the mask [..., T].

    Two completions of a packed row have a place that belongs to neither between them (`types.Rows`): so it is where the
    next token belongs to the same completion.
    """
    after = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], axis=-1)
    return mask * after


def last_places(mask: Array) -> Array:
    """f32[..., T]: 1 at the last place of each run of the mask: the last token of each completion."""
    return mask * (1 - continues(mask))
