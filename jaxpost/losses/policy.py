"""Policy-gradient losses: log-ratios and advantages of sampled tokens in, one value per token out, f32.

To add one: write a function of those of `log_ratios, advantages, logps` that it reads, hyperparameters keyword-only,
and decorate it with `@policy`. log_ratios are log pi(a_t | s_t) - log pi_old(a_t | s_t), pi_old the policy at the start
of the update; logps is the first of the two. Arrays are [C, T], a completion a row, or packed rows [B, T]; what stands
at places without a token means nothing and affects no other. What belongs to a whole completion (its advantage, the
mean or sum of its log-ratios) is given at each of its tokens, or as [C, 1]. Advantages are constants.

GRPO, DAPO and Dr. GRPO are `ppo` with advantages of groups and a mean of their own (`token_mean`, `completion_mean`,
`constant_mean`); GSPO is `ppo` of mean log-ratios, RLOO of summed ones; LUSPO is GSPO under `constant_mean`.
"""

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from jaxpost.types import Mean

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LOSSES = {}  # name in a config -> function

# A ratio beyond e^20 says nothing more. At e^89 it is infinite in float32 and, clipped or not, its gradient NaN.
LARGEST_LOG_RATIO = 20.0


def policy(loss):
    """Makes `loss` known to configs by its name."""
    LOSSES[loss.__name__] = loss
    return loss


def ratios(log_ratios: "Float[Array, '...']") -> "Float[Array, '...']":
    """pi / pi_old, held between e^-20 and e^20.

    >>> print(ratios(jnp.array([0.0])))
    [1.]
    """
    return jnp.exp(jnp.clip(log_ratios, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))


@policy
def ppo(
    log_ratios: "Float[Array, '...']",
    advantages: "Float[Array, '...']",
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> "Float[Array, '...']":
    """PPO's clipped surrogate: -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), r = pi / pi_old.

    With dual_clip c > 1, where A < 0 the loss is at most -c A, however much likelier the token has become.

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347, equation 7.
    Ye et al. 2020, "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", arXiv:1912.09729
    (dual_clip). Yu et al. 2025, "DAPO", arXiv:2503.14476, section 3.1 (two epsilons).

    >>> print(ppo(jnp.log(jnp.array([1.5, 1.5])), jnp.array([1.0, -1.0])))  # clipped where the step would be too far
    [-1.2  1.5]
    """
    ratio = ratios(log_ratios)
    objective = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * advantages)
    if dual_clip is not None:
        objective = jnp.where(advantages < 0, jnp.maximum(objective, dual_clip * advantages), objective)
    return -objective


@policy
def cispo(
    log_ratios: "Float[Array, '...']",
    advantages: "Float[Array, '...']",
    logps: "Float[Array, '...']",
    *,
    ratio_high: float = 5.0,
) -> "Float[Array, '...']":
    """CISPO: -sg(min(r, ratio_high)) A log pi, sg = stop-gradient: clipped tokens count less, but still count.

    MiniMax 2025, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", arXiv:2506.13585,
    equation 4, with no lower bound (ratio_high is its 1 + epsilon_high).

    >>> print(cispo(jnp.log(jnp.array([9.0])), jnp.array([1.0]), jnp.array([-2.0])))
    [10.]
    """
    return -jax.lax.stop_gradient(jnp.minimum(ratios(log_ratios), ratio_high)) * advantages * logps


@policy
def sapo(
    log_ratios: "Float[Array, '...']",
    advantages: "Float[Array, '...']",
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> "Float[Array, '...']":
    """SAPO: -(4 / tau) sigma(tau (r - 1)) A, a soft gate in the place of the clip; tau by the sign of A.

    Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv:2511.20347.

    >>> print(sapo(jnp.array([0.0]), jnp.array([1.0])))  # 4 sigma(0)
    [-2.]
    """
    tau = jnp.where(advantages > 0, temperature_positive, temperature_negative)
    return -4 / tau * jax.nn.sigmoid(tau * (ratios(log_ratios) - 1)) * advantages


@policy
def vespo(
    log_ratios: "Float[Array, '...']",
    advantages: "Float[Array, '...']",
    logps: "Float[Array, '...']",
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> "Float[Array, '...']":
    """VESPO: -sg(w^k exp(lambda (1 - w))) A log pi, w = pi / pi_old of the completion; k, lambda by the sign of A.

    log_ratios are summed over the completion, pi_old is the policy that sampled it. Shen et al. 2026, "VESPO:
    Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training", arXiv:2602.10693.

    >>> print(vespo(jnp.array([0.0]), jnp.array([1.0]), jnp.array([-2.0])))  # on policy: -A log pi
    [2.]
    """
    k = jnp.where(advantages >= 0, k_positive, k_negative)
    lam = jnp.where(advantages >= 0, lambda_positive, lambda_negative)
    log_w = jnp.clip(log_ratios, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    weight = jnp.exp(k * log_w + lam * (1 - jnp.exp(log_w)))
    return -jax.lax.stop_gradient(weight) * advantages * logps


def is_clipped(
    log_ratios: "Float[Array, '...']",
    advantages: "Float[Array, '...']",
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> "Float[Array, '...']":
    """1 where `ppo` of the same arguments has no gradient because it is clipped, 0 elsewhere. Its mean: clip fraction.

    >>> print(is_clipped(jnp.log(jnp.array([1.5, 1.5, 0.5])), jnp.array([1.0, -1.0, -1.0])))
    [1. 0. 1.]
    """
    ratio = ratios(log_ratios)
    clipped = jnp.where(advantages > 0, ratio > 1 + epsilon_high, (advantages < 0) & (ratio < 1 - epsilon_low))
    if dual_clip is not None:
        clipped |= (advantages < 0) & (ratio > dual_clip)
    return clipped.astype(ratio.dtype)


def importance_weights(
    log_ratios: "Float[Array, '...']",
    *,
    low: float | None = None,
    high: float | None = 2.0,
    outside: Literal["truncate", "mask"] = "truncate",
) -> "Float[Array, '...']":
    """w = pi_old / pi_sampler, by which a loss is multiplied where another policy drew the tokens. No gradient.

    log_ratios: log pi_old - log pi_sampler of tokens, or summed over completions, as [C, 1] or at each token. Weights
    outside [low, high] become the bound ("truncate": less variance for some bias) or 0 ("mask": the token is left out).

    Espeholt et al. 2018, "IMPALA", arXiv:1802.01561, section 4.1 (truncated). Ling Team 2025, "Every Step Evolves",
    arXiv:2510.18855 (masked: IcePop).

    >>> print(importance_weights(jnp.log(jnp.array([0.5, 3.0])), high=2.0))
    [0.5 2. ]
    >>> print(importance_weights(jnp.log(jnp.array([0.5, 3.0])), high=2.0, outside="mask"))
    [0.5 0. ]
    """
    if outside not in ("truncate", "mask"):
        raise ValueError(f"outside: {outside!r}, expected truncate or mask")
    weights = ratios(log_ratios)
    held = jnp.clip(weights, low, high)
    if outside == "mask":
        held = jnp.where(weights == held, weights, 0.0)
    return jax.lax.stop_gradient(held)


def off_policy_mask(
    log_ratios: "Float[Array, '...']", advantages: "Float[Array, '...']", *, threshold: float
) -> "Float[Array, '...']":
    """0 at completions that were worse than others and that the policy has left by now, 1 elsewhere. No gradient.

    log_ratios: log pi - log pi_sampler, means over completions; left: less than -threshold.
    DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556, section 3.1.

    >>> print(off_policy_mask(jnp.array([-1.0, -1.0, 1.0]), jnp.array([1.0, -1.0, -1.0]), threshold=0.5))
    [1. 0. 1.]
    """
    kept = (advantages >= 0) | (-log_ratios <= threshold)
    return jax.lax.stop_gradient(kept.astype(log_ratios.dtype))


def high_entropy_mask(
    entropies: "Float[Array, '...']", mask: "Float[Array, '...']", *, share: float
) -> "Float[Array, '...']":
    """1 at this share of the tokens (where mask is 1) with the highest entropy, 0 elsewhere. No gradient.

    The quantile is that of the tokens given, as of a microbatch. Wang et al. 2025, "Beyond the 80/20 Rule: High-Entropy
    Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning", arXiv:2506.01939.

    >>> print(high_entropy_mask(jnp.array([0.1, 2.0, 0.5, 9.0]), jnp.array([1.0, 1.0, 1.0, 0.0]), share=0.4))
    [0. 1. 0. 0.]
    """
    least = jnp.nanquantile(jnp.where(mask > 0, entropies, jnp.nan), 1 - share)
    return jax.lax.stop_gradient(((entropies >= least) & (mask > 0)).astype(entropies.dtype))


def token_mean(losses: "Float[Array, '...']", mask: "Float[Array, '...']") -> Mean:
    """Every token counts the same: PPO, DAPO.

    >>> print(token_mean(jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])).value)
    3.0
    """
    return Mean(_total(losses, mask), mask.sum())


def completion_mean(
    losses: "Float[Array, '...']", mask: "Float[Array, '...']", lengths: "Float[Array, '...']", completions
) -> Mean:
    """Every completion counts the same, a token by 1 / length: GRPO (Shao et al. 2024, arXiv:2402.03300, equation 3).

    lengths: scored tokens of the completion, at each token or [C, 1]. completions: how many there are.

    >>> losses, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    >>> print(completion_mean(losses, mask, mask.sum(1, keepdims=True), 2).value)
    3.75
    """
    return Mean(_total(losses / jnp.maximum(lengths, 1), mask), jnp.asarray(completions, losses.dtype))


def constant_mean(losses: "Float[Array, '...']", mask: "Float[Array, '...']", completions, *, length: float) -> Mean:
    """The sum over tokens, by completions and one length for all: Dr. GRPO, at the largest length; LUSPO, at 1.

    Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv:2503.20783. Liu et al. 2026,
    "Length-Unbiased Sequence Policy Optimization", arXiv:2602.05261.

    >>> losses, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    >>> print(constant_mean(losses, mask, 2, length=3.0).value)
    1.5
    """
    return Mean(_total(losses, mask), jnp.asarray(completions * length, losses.dtype))


def _total(losses, mask):
    return jnp.where(mask > 0, losses * mask, 0.0).sum()
