"""Advantages of sampled tokens."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


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
