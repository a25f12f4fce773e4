"""The coefficient of the KL, from update to update: state in, state out."""

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LARGEST_ERROR = 0.2  # proportional, so that one odd batch does not throw the coefficient


def fixed(coefficient: "Float[Array, '']", kl: "Float[Array, '']") -> "Float[Array, '']":
    """The coefficient as it is."""
    return coefficient


def adaptive(
    coefficient: "Float[Array, '']", kl: "Float[Array, '']", *, target: float, gain: float = 0.1
) -> "Float[Array, '']":
    """coefficient * (1 + gain * clip((kl - target) / target, -0.2, 0.2)): up where the KL is above its target.

    kl and target in nats, both per token or both per completion.
    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, section 2.2.

    >>> print(adaptive(jnp.array(0.5), jnp.array(12.0), target=6.0))  # 0.5 * (1 + 0.1 * 0.2)
    0.51
    """
    error = jnp.clip((kl - target) / target, -LARGEST_ERROR, LARGEST_ERROR)
    return coefficient * (1 + gain * error)
