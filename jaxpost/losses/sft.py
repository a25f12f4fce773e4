"""Losses of supervised fine-tuning. Each takes log-probabilities of target tokens and returns one value per token."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LOSSES = {}  # name in a config -> function


def sft(loss):
    """Makes `loss` known to configs by its name."""
    LOSSES[loss.__name__] = loss
    return loss


@sft
def nll(logps: "Float[Array, '...']") -> "Float[Array, '...']":
    """Negative log-likelihood of each token: -log p."""
    return -logps


@sft
def dft(logps: "Float[Array, '...']") -> "Float[Array, '...']":
    """Dynamic fine-tuning: -sg(p) log p, sg = stop-gradient, so that rare tokens do not dominate.

    Wu et al. 2025, "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
    Rectification", arXiv:2508.05629, equation 9.

    >>> print(dft(jnp.log(jnp.array([0.5]))))  # 0.5 * ln 2
    [0.3465736]
    """
    return -jax.lax.stop_gradient(jnp.exp(logps)) * logps
