"""Losses of reward models: scores of completions in, one value per pair, ranking, completion or step out, f32.

K completions of a ranking stand best first; `mask` is 1 where there is one.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxpost.losses.pairs import smoothed

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LOSSES = {}  # name in a config -> function


def reward(loss):
    """Makes `loss` known to configs by its name."""
    LOSSES[loss.__name__] = loss
    return loss


@reward
def bradley_terry(
    chosen: "Float[Array, '...']",
    rejected: "Float[Array, '...']",
    margin=None,
    *,
    centering: float = 0.0,
    label_smoothing: float = 0.0,
) -> "Float[Array, '...']":
    """-log sigma(r_w - r_l - m) + centering * (r_w + r_l)^2.

    m is how much better the chosen one is, as the data say (none: 0); centering draws the scores towards mean 0;
    label_smoothing e in place of -log sigma(d): -(1 - e) log sigma(d) - e log sigma(-d), smallest at d = log(1/e - 1),
    so that no score runs away and models trained apart agree on their scale.
    Ouyang et al. 2022, arXiv:2203.02155, equation 1; Touvron et al. 2023 (Llama 2), arXiv:2307.09288, equation 2
    (margin); Eisenstein et al. 2023, "Helping or Herding?", arXiv:2312.09244, equation 2 (centring); Wang et al. 2024,
    "Secrets of RLHF in Large Language Models Part II: Reward Modeling", arXiv:2401.06080 (label smoothing).

    >>> print(bradley_terry(jnp.array([1.0]), jnp.array([1.0])), bradley_terry(jnp.array([1.0]), jnp.array([0.0]), 1.0))
    [0.6931472] [0.6931472]
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return smoothed(difference, label_smoothing) + centering * (chosen + rejected) ** 2


@reward
def plackett_luce(rewards: "Float[Array, '... K']", mask: "Float[Array, '... K']") -> "Float[Array, '...']":
    """-log prod_k exp(r_k) / sum_(j >= k) exp(r_j): the best is drawn first, then the best of the rest.

    Of tied completions, the order given counts. 0 where a ranking has fewer than two.
    Plackett 1975, "The Analysis of Permutations"; Rafailov et al. 2023, arXiv:2305.18290, equation 18.

    >>> print(plackett_luce(jnp.zeros((1, 3)), jnp.ones((1, 3))))  # ln 3! : all orders alike
    [1.7917595]
    """
    held = jnp.where(mask > 0, rewards, -1e30)  # not -inf, whose gradient is NaN where none remains
    remaining = jax.lax.cumlogsumexp(held, axis=held.ndim - 1, reverse=True)
    return jnp.where(mask > 0, remaining - held, 0.0).sum(-1)


@reward
def all_pairs(
    rewards: "Float[Array, '... K']", mask: "Float[Array, '... K']", scores=None, *, label_smoothing: float = 0.0
) -> "Float[Array, '...']":
    """Mean over the pairs i < j of a ranking of -log sigma(r_i - r_j), so that a ranking counts as one example.

    scores: what the data say of each; pairs of equal score are left out. 0 where a ranking has no pair.
    label_smoothing: as in `bradley_terry`.
    Ouyang et al. 2022, "Training language models to follow instructions with human feedback", arXiv:2203.02155,
    equation 1.

    >>> print(all_pairs(jnp.zeros((1, 4)), jnp.ones((1, 4))))
    [0.6931472]
    """
    index = jnp.arange(rewards.shape[-1])
    scores = jnp.broadcast_to(-index.astype(rewards.dtype), rewards.shape) if scores is None else scores
    better = scores[..., :, None] > scores[..., None, :]
    pairs = better & (mask[..., :, None] > 0) & (mask[..., None, :] > 0)
    losses = smoothed(rewards[..., :, None] - rewards[..., None, :], label_smoothing)
    count = pairs.sum((-2, -1))
    return jnp.where(pairs, losses, 0.0).sum((-2, -1)) / jnp.maximum(count, 1).astype(rewards.dtype)


@reward
def regression(rewards: "Float[Array, '...']", scores: "Float[Array, '...']") -> "Float[Array, '...']":
    """(r - score)^2: the reward is the score that the data give.

    Wang et al. 2024, "HelpSteer2: Open-source dataset for training top-performing reward models", arXiv:2406.08673,
    section 3.1.

    >>> print(regression(jnp.array([1.0]), jnp.array([3.0])))
    [4.]
    """
    return (rewards - scores) ** 2


@reward
def process(rewards: "Float[Array, '...']", labels: "Float[Array, '...']") -> "Float[Array, '...']":
    """-y log sigma(r) - (1 - y) log sigma(-r) of each step: y in [0, 1] its label, r the score at its last token.

    Over whole rows of tokens, the caller weights 1 at the ends of steps and 0 elsewhere.
    Lightman et al. 2023, "Let's Verify Step by Step", arXiv:2305.20050, section 2; soft labels as in Wang et al. 2023,
    "Math-Shepherd", arXiv:2312.08935, equation 2.

    >>> print(process(jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0])))
    [0.6931472 0.6931472]
    """
    return -labels * jax.nn.log_sigmoid(rewards) - (1 - labels) * jax.nn.log_sigmoid(-rewards)
