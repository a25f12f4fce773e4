"""What preference losses are given: log-probabilities of pairs, and what may be done to them before the loss."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class PairLogps:
    """log pi(y | x) summed over the completion's tokens, for the chosen y_w and the rejected y_l of P pairs.

    A pair without tokens is an empty place of a packed batch; its value means nothing, and it affects no other's.
    """

    chosen: "Float[Array, 'P']"
    rejected: "Float[Array, 'P']"
    chosen_tokens: "Float[Array, 'P'] | None" = None  # how many tokens the sums are over
    rejected_tokens: "Float[Array, 'P'] | None" = None
    margin: "Float[Array, 'P'] | None" = None  # how much better y_w is, as the data say: a difference of scores


def smoothed(margin, label_smoothing: float = 0.0):
    """-(1 - e) log sigma(margin) - e log sigma(-margin): labels are wrong with probability e = label_smoothing."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> "tuple[Array, Array]":
    """log(pi / pi_ref) of chosen and rejected, f32[P] each."""
    if reference is None:
        return policy.chosen, policy.rejected
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def with_divergence(
    policy: PairLogps, reference: PairLogps | None, *, divergence: str, alpha: float = 0.5
) -> PairLogps:
    """f-DPO: f'(pi / pi_ref) in the place of log(pi / pi_ref): to be given to a loss as `policy`, with reference None.

    f'(t), shifted to 0 at t = 1, is log t for reverse_kl, 1 - 1/t for forward_kl, log(2t / (1 + t)) for
    js_divergence and (t^(alpha - 1) - 1) / (alpha - 1) for alpha_divergence, which is reverse_kl at alpha 1. Only for
    losses of the margin, where the normaliser of the optimal policy cancels. Raises ValueError for another name.

    Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints", arXiv:2309.16240, equation 8 and table 1.

    >>> pair = PairLogps(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])))
    >>> print(with_divergence(pair, None, divergence="forward_kl").chosen)  # 1 - 1 / 0.5
    [-1.]
    """
    exponent = alpha - 1
    derivatives = {
        "reverse_kl": lambda ratio: ratio,
        "forward_kl": lambda ratio: -jnp.expm1(-ratio),
        "js_divergence": lambda ratio: jax.nn.log_sigmoid(ratio) + math.log(2),
        # e^80: float32 holds it and the sum of a batch of it
        "alpha_divergence": lambda ratio: jnp.expm1(jnp.minimum(exponent * ratio, 80.0)) / exponent,
    }
    if divergence == "alpha_divergence" and abs(exponent) < 1e-6:
        divergence = "reverse_kl"
    if divergence not in derivatives:
        raise ValueError(f"divergence: {divergence!r}, expected one of {', '.join(derivatives)}")
    chosen, rejected = map(derivatives[divergence], log_ratios(policy, reference))
    return dataclasses.replace(policy, chosen=chosen, rejected=rejected)


def implicit_rewards(policy: PairLogps, reference: PairLogps | None, *, beta: float) -> "tuple[Array, Array]":
    """r(x, y) = beta * log(pi(y | x) / pi_ref(y | x)) of chosen and rejected, f32[P] each (DPO, section 4)."""
    chosen, rejected = log_ratios(policy, reference)
    return beta * chosen, beta * rejected


def means(policy: PairLogps, chosen, rejected) -> "tuple[Array, Array]":
    """Sums over y_w and y_l as means over their tokens."""
    return chosen / jnp.maximum(policy.chosen_tokens, 1), rejected / jnp.maximum(policy.rejected_tokens, 1)


def ld_weights(index, chosen_tokens, rejected_tokens, *, alpha: float):
    """LD-DPO: the weight of each token in the sums of policy and reference, 1 up to the shorter length, then alpha.

    index: place of the token in its completion, from 0; all three of one shape, or broadcast. alpha 1 is DPO, 0 cuts
    both completions to the shorter. Liu et al. 2024, "Length Desensitization in Direct Preference Optimization",
    arXiv:2409.06411, equation 9.

    >>> print(ld_weights(jnp.arange(4), jnp.full(4, 4), jnp.full(4, 2), alpha=0.5))
    [1.  1.  0.5 0.5]
    """
    return jnp.where(index < jnp.minimum(chosen_tokens, rejected_tokens), 1.0, alpha)


def wpo_weights(policy: PairLogps, expected: PairLogps) -> "Float[Array, 'P']":
    """WPO: the weight of each pair's loss, larger where the policy might have sampled it: w(y_w) * w(y_l), no gradient.

    w(y) = exp(mean over tokens of (log p_t - log sum_v p_t(v)^2)). `expected` has the sums of log sum_v p_t(v)^2.
    Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", arXiv:2406.11827, equation 2.

    >>> one = PairLogps(jnp.array([-2.0]), jnp.array([-3.0]), jnp.array([2.0]), jnp.array([3.0]))
    >>> print(wpo_weights(one, one))
    [1.]
    """
    chosen, rejected = means(policy, policy.chosen - expected.chosen, policy.rejected - expected.rejected)
    return jax.lax.stop_gradient(jnp.exp(chosen + rejected))
