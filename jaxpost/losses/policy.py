"""Policy-gradient losses: log-ratios and advantages of sampled tokens in, one value per token out, f32.

log_ratios are log pi(a_t | s_t) - log pi_old(a_t | s_t), pi_old the policy at the start of the update. Arrays are
[C, T], a completion a row, or packed rows [B, T]; what stands at places without a token means nothing and affects no
other. The advantage of a whole completion is given at each of its tokens, or as [C, 1]. It is a constant.
"""

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

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
