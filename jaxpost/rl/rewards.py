"""From the score of a completion to the rewards of its tokens: shaping, normalisation, the KL in the reward."""

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxpost.ops.masked import last_places
from jaxpost.types import Array, record

if TYPE_CHECKING:
    from jaxtyping import Float


def token_rewards(
    scores: "Float[Array, '...']", kl: "Float[Array, '... T']", mask: "Float[Array, '... T']", *, kl_coef: float
) -> "Float[Array, '... T']":
    """r_t = -kl_coef * kl_t at every token of a completion, and at its last one the score besides; 0 elsewhere.

    scores: of completions, [C, 1] or at every token (`ops.completions.at_tokens`). kl: an estimate of `losses.kl` per
    token; kl_coef may be an array. mask: 1 at the tokens of completions, with at least one 0 between two of a row.

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, equation 2.

    >>> print(token_rewards(jnp.array([1.0]), jnp.array([2.0, 4.0, 9.0]), jnp.array([1.0, 1.0, 0.0]), kl_coef=0.1))
    [-0.2  0.6  0. ]
    """
    return jnp.where(mask > 0, scores * last_places(mask) - kl_coef * kl, 0.0)


def penalize_missing_eos(
    scores: "Float[Array, '...']", ended: "Float[Array, '...']", *, penalty: float = 0.0, score: float | None = None
) -> "Float[Array, '...']":
    """The score less `penalty`, or `score` in its place, where a completion did not end by itself (ended: 1 or 0).

    Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031, section 7 (the EOS trick: a
    fixed score).

    >>> print(penalize_missing_eos(jnp.array([2.0, 2.0]), jnp.array([1.0, 0.0]), penalty=1.5))
    [2.  0.5]
    >>> print(penalize_missing_eos(jnp.array([2.0, 2.0]), jnp.array([1.0, 0.0]), score=-1.0))
    [ 2. -1.]
    """
    without = scores - penalty if score is None else jnp.full_like(scores, score)
    return jnp.where(ended > 0, scores, without)


def penalize_length(
    scores: "Float[Array, '...']", tokens: "Float[Array, '...']", *, penalty: float, free_tokens: int = 0
) -> "Float[Array, '...']":
    """The score less `penalty` for each token of the completion beyond the first `free_tokens`.

    Yu et al. 2025, "DAPO", arXiv:2503.14476, equation 13, at penalty = 1 / L_cache, free_tokens = L_max - L_cache.

    >>> print(penalize_length(jnp.array([2.0, 2.0]), jnp.array([10.0, 14.0]), penalty=0.25, free_tokens=12))
    [2.  1.5]
    """
    return scores - penalty * jnp.maximum(tokens - free_tokens, 0.0)


@record
class Moments:
    """How many scores there were, their mean and the sum of their squared distances from it; f32[] each."""

    count: Array
    mean: Array
    squares: Array

    @classmethod
    def none(cls) -> "Moments":
        """Before the first score."""
        return cls(*[jnp.zeros((), jnp.float32)] * 3)

    @property
    def std(self) -> Array:
        """Unbiased (n - 1); 1 before there are two scores that differ."""
        variance = self.squares / jnp.maximum(self.count - 1, 1.0)
        return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 1.0)


def observe(moments: Moments, scores: "Float[Array, '...']", mask: "Float[Array, '...'] | None" = None) -> Moments:
    """The moments with a batch of scores (where mask is 1) added, as if all had been seen at once.

    Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".

    >>> seen = observe(observe(Moments.none(), jnp.array([1.0])), jnp.array([2.0, 3.0]))
    >>> print(seen.mean, seen.std)
    2.0 1.0
    """
    mask = jnp.ones_like(scores) if mask is None else mask
    added = mask.sum()
    mean = jnp.where(mask > 0, scores, 0.0).sum() / jnp.maximum(added, 1.0)
    squares = jnp.where(mask > 0, (scores - mean) ** 2, 0.0).sum()
    count = moments.count + added
    share, difference = added / jnp.maximum(count, 1.0), mean - moments.mean
    between = difference**2 * moments.count * share
    return Moments(count, moments.mean + difference * share, moments.squares + squares + between)


def normalize(scores: "Float[Array, '...']", moments: Moments, *, center: bool = True) -> "Float[Array, '...']":
    """Scores in units of their standard deviation so far; center=False leaves their sign and zero as they are."""
    return (scores - moments.mean if center else scores) / moments.std
