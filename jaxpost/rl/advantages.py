"""Advantages: of tokens by a value model (jax), of whole completions by others of their prompt (numpy, host).

Of completions, rewards are f[C], NaN where one has none: it counts for nothing and its advantage is 0. groups: int[C],
the prompt of each; the completions of a group may stand anywhere.
"""

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float

EPSILON = 1e-4  # added to a standard deviation of rewards


def gae(
    rewards: "Float[Array, '... T']",
    values: "Float[Array, '... T']",
    continues: "Float[Array, '... T']",
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> "tuple[Float[Array, '... T'], Float[Array, '... T']]":
    """Generalised advantage estimation: (advantages, returns), both [..., T].

    A_t = sum_l (gamma lam)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t, the sum up to the completion's last
    token, after which V is 0; returns are A + V. V_t (`values`) is the value of the state before token t: what a value
    model says at the token before. continues: 1 where the next place belongs to the same completion
    (`ops.masked.continues`), so that completions of a packed row do not see each other. Places of no completion get
    reward - value and affect no others.

    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    arXiv:1506.02438, equation 16.

    >>> one, goes_on = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])
    >>> print(gae(one, jnp.array([[0.5, 0.5]]), goes_on, gamma=1.0, lam=0.5)[0])  # 0 + 0.5 * 0.5 ; 1 - 0.5
    [[0.25 0.5 ]]
    """

    def step(after, here):
        advantage, value = after
        reward, this_value, goes_on = here
        delta = reward + gamma * goes_on * value - this_value
        advantage = delta + gamma * lam * goes_on * advantage
        return (advantage, this_value), advantage

    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, values, continues))
    end = jnp.zeros_like(values[..., 0])
    _, advantages = jax.lax.scan(step, (end, end), by_time, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, advantages + values


def group_relative(
    rewards: "Float[Array, 'C']", groups: "Float[Array, 'C']", *, scale: Literal["group", "batch", "none"] = "group"
) -> "Float[Array, 'C']":
    """(r - mean of its group) / std of the group, of all rewards given, or 1. f32[C]; 0 where a group is all alike.

    Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section 4.1.2 (group); Liu et al. 2025, "Understanding
    R1-Zero-Like Training", arXiv:2503.20783 (none).

    >>> print(group_relative([1.0, 3.0, 5.0, 5.0], [0, 0, 7, 7], scale="none"))
    [-1.  1.  0.  0.]
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: {scale!r}, expected group, batch or none")
    rewards = np.asarray(rewards, np.float64)
    mean, std, _ = _of_groups(rewards, groups)
    if scale == "batch":
        std = _of_groups(rewards, np.zeros(len(rewards), int))[1]
    return _filled((rewards - mean) / (1.0 if scale == "none" else std + EPSILON))


def leave_one_out(rewards: "Float[Array, 'C']", groups: "Float[Array, 'C']") -> "Float[Array, 'C']":
    """RLOO: r - mean of the others of its group. f32[C]; 0 where there are none.

    Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", arXiv:2402.14740.

    >>> print(leave_one_out([1.0, 2.0, 6.0], [0, 0, 0]))  # 1 - 8/2 ; 2 - 7/2 ; 6 - 3/2
    [-3.  -1.5  4.5]
    """
    rewards = np.asarray(rewards, np.float64)
    mean, _, count = _of_groups(rewards, groups)
    return _filled((rewards - mean) * count / np.maximum(count - 1, 1))


def normalized(advantages: "Float[Array, 'C']") -> "Float[Array, 'C']":
    """(A - mean) / std over all that are given. f32[C].

    Hu et al. 2025, "REINFORCE++", arXiv:2501.03262 (global advantage normalisation).

    >>> print(normalized([1.0, 3.0, 2.0]).round(3))
    [-1.  1.  0.]
    """
    return group_relative(advantages, np.zeros(len(advantages), int))


def combined(rewards: "Float[Array, 'C F']", weights: "Float[Array, 'F']") -> "Float[Array, 'C']":
    """The weighted sum of F rewards, f64[C], of those that there are; NaN where a completion has none.

    >>> print(combined([[1.0, 2.0], [np.nan, 2.0]], [1.0, 0.5]))
    [2. 1.]
    """
    rewards = np.asarray(rewards, np.float64)
    summed = np.nansum(rewards * np.asarray(weights, np.float64), axis=1)
    return np.where(np.isnan(rewards).all(axis=1), np.nan, summed)


def decoupled(
    rewards: "Float[Array, 'C F']", weights: "Float[Array, 'F']", groups: "Float[Array, 'C']"
) -> "Float[Array, 'C']":
    """GDPO: F rewards made group-relative each on its own, so that no scale drowns another, then summed. f32[C].

    Liu et al. 2026, "GDPO: Group reward-Decoupled Normalization Policy Optimization", arXiv:2601.05242.

    >>> print(decoupled([[1.0, 0.0], [2.0, 0.0], [3.0, 90.0]], [1.0, 1.0], [0, 0, 0]).round(2))
    [-0.82 -0.3   1.12]
    """
    rewards = np.asarray(rewards, np.float64)
    parts = np.stack([group_relative(column, groups) for column in rewards.T], axis=1)
    return normalized(combined(np.where(np.isnan(rewards), np.nan, parts), weights))


def _of_groups(rewards, groups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, unbiased standard deviation and count of the rewards of each completion's group, f64[C] each."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    there = ~np.isnan(rewards)
    count = np.bincount(index, there)
    mean = np.bincount(index, np.where(there, rewards, 0.0)) / np.maximum(count, 1)
    squares = np.bincount(index, np.where(there, (rewards - mean[index]) ** 2, 0.0))
    std = np.sqrt(squares / np.maximum(count - 1, 1))
    return mean[index], std[index], count[index]


def _filled(advantages: np.ndarray) -> np.ndarray:
    return np.nan_to_num(advantages, nan=0.0).astype(np.float32)
