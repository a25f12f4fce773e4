"""Preference losses. Each takes the summed log-probabilities of P pairs and returns one value per pair, f32[P].

To add one: write a function `(policy, reference, *, hyperparameters) -> f32[P]` and decorate it with `@preference`.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LOSSES = {}  # name in a config -> function


def preference(loss):
    """Makes `loss` known to configs by its name."""
    LOSSES[loss.__name__] = loss
    return loss


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class PairLogps:
    """log pi(y | x) summed over the completion's tokens, for the chosen y_w and the rejected y_l of P pairs."""

    chosen: "Float[Array, 'P']"
    rejected: "Float[Array, 'P']"
    chosen_tokens: "Float[Array, 'P'] | None" = None  # how many tokens the sums are over
    rejected_tokens: "Float[Array, 'P'] | None" = None


def implicit_rewards(policy: PairLogps, reference: PairLogps, *, beta: float) -> "tuple[Array, Array]":
    """r(x, y) = beta * log(pi(y | x) / pi_ref(y | x)) of chosen and rejected, f32[P] each (DPO, section 4)."""
    return beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)


@preference
def sigmoid(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> "Float[Array, 'P']":
    """DPO: -log sigma(h), h = r(x, y_w) - r(x, y_l), r = beta * log(pi / pi_ref).

    With label_smoothing e, conservative DPO: -(1 - e) log sigma(h) - e log sigma(-h), for labels that are wrong
    with probability e in [0, 0.5).

    Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290, equation 7.
    Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", equation 3.

    >>> import jax.numpy as jnp
    >>> same = PairLogps(chosen=jnp.array([-5.0]), rejected=jnp.array([-7.0]))
    >>> print(sigmoid(same, same, beta=0.1))  # policy = reference: ln 2
    [0.6931472]
    """
    chosen, rejected = implicit_rewards(policy, reference, beta=beta)
    margin = chosen - rejected
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
