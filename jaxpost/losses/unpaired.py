"""Losses of single completions judged good or bad. Each takes C log-ratios' parts and returns one value each, f32[C].

To add one: write a function `(policy, reference, label, baseline, *, hyperparameters) -> f32[C]` and decorate it with
`@unpaired`. policy and reference are log pi(y | x) summed over the completion's tokens, label is 1 where y is good and
0 where it is bad, and r = beta * log(pi / pi_ref) is the implicit reward. What the baseline is, the decorator says.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxpost.types import Mean

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LOSSES = {}  # name in a config -> function


def unpaired(*, baseline: str | None):
    """Makes a loss known to configs by its name.

    baseline: "kl", the estimate `kl` below; "reward", the running mean of all rewards; None, the loss reads none.
    """

    def add(loss):
        loss.baseline = baseline
        LOSSES[loss.__name__] = loss
        return loss

    return add


def kl(policy: "Float[Array, 'C']", reference: "Float[Array, 'C']", valid=None) -> "Float[Array, '']":
    """KTO's z_0 = max(0, mean of log(pi(y' | x) / pi_ref(y' | x))), y' an answer to another prompt. No gradient.

    valid: 1 where there is such a pair, 0 elsewhere; where there is none at all, z_0 is 0.
    Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1.

    >>> print(kl(jnp.array([-1.0, -5.0]), jnp.array([-2.0, -5.0])))
    0.5
    """
    valid = jnp.ones_like(policy) if valid is None else valid
    mean = Mean(((policy - reference) * valid).sum(), valid.sum()).value
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


@unpaired(baseline="kl")
def kto(
    policy: "Float[Array, 'C']",
    reference: "Float[Array, 'C']",
    label: "Float[Array, 'C']",
    baseline: "Float[Array, '']",
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> "Float[Array, 'C']":
    """KTO: lambda * (1 - sigma(s * (r - beta * z_0))), s = 1 for good and -1 for bad completions, lambda their weight.

    Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306, equations 7, 8.

    >>> print(kto(jnp.array([-5.0]), jnp.array([-5.0]), jnp.array([1.0]), 0.0))
    [0.5]
    """
    sign = 2 * label - 1
    weight = jnp.where(label > 0, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-sign * beta * (policy - reference - baseline))


@unpaired(baseline=None)
def apo_zero_unpaired(
    policy: "Float[Array, 'C']",
    reference: "Float[Array, 'C']",
    label: "Float[Array, 'C']",
    baseline=None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> "Float[Array, 'C']":
    """APO-zero of single completions: lambda * (1 - sigma(r)) for good ones, lambda * sigma(r) for bad: KTO at z_0 = 0.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", arXiv:2408.06266,
    equation 7.

    >>> print(apo_zero_unpaired(jnp.array([-5.0]), jnp.array([-5.0]), jnp.array([0.0])))
    [0.5]
    """
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(policy, reference, label, 0.0, beta=beta, **weights)


@unpaired(baseline="reward")
def bco(
    policy: "Float[Array, 'C']",
    reference: "Float[Array, 'C']",
    label: "Float[Array, 'C']",
    baseline: "Float[Array, '']",
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> "Float[Array, 'C']":
    """BCO: -lambda * log sigma(s * (r - delta)), s = 1 for good and -1 for bad, delta the running mean of r.

    The running mean is a `Mean` that the caller keeps: `reward_shift(state, r, valid)` gives the next one.
    Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656,
    equations 9 and 10.

    >>> print(bco(jnp.array([-5.0]), jnp.array([-5.0]), jnp.array([1.0]), 0.0))
    [0.6931472]
    """
    sign = 2 * label - 1
    weight = jnp.where(label > 0, desirable_weight, undesirable_weight)
    return -weight * jax.nn.log_sigmoid(sign * (beta * (policy - reference) - baseline))


def reward_shift(state: Mean, rewards: "Float[Array, 'C']", valid=None) -> Mean:
    """BCO's running mean with the rewards of a batch: its value is delta. `Mean(0, 0)` to begin with. No gradient.

    >>> state = reward_shift(Mean(jnp.array(0.0), jnp.array(0.0)), jnp.array([1.0, 3.0]))
    >>> print(state.value, reward_shift(state, jnp.array([5.0])).value)
    2.0 3.0
    """
    valid = jnp.ones_like(rewards) if valid is None else valid
    return jax.lax.stop_gradient(state + Mean((rewards * valid).sum(), valid.sum()))
