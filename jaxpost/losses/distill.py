"""Distillation losses: log-probabilities of student and teacher over the vocabulary in, one value per token out, f32.

Both are log-probabilities over the last axis: all V tokens, or the teacher's k likeliest and the rest as one
(`with_rest`). Divide logits by a temperature before the log-softmax, as in `logps`.
"""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LOSSES = {}  # name in a config -> function


def distill(loss):
    """Makes `loss` known to configs by its name."""
    LOSSES[loss.__name__] = loss
    return loss


def logps(logits: "Float[Array, '... V']", *, temperature: float = 1.0) -> "Float[Array, '... V']":
    """log softmax(logits / temperature); Hinton et al. 2015, arXiv:1503.02531, equation 1."""
    return jax.nn.log_softmax(logits / temperature)


def with_rest(logps: "Float[Array, '... k']") -> "Float[Array, '... k+1']":
    """k log-probabilities of a distribution and, last, that of all other tokens together.

    A divergence of such a pair is a lower bound of that over the whole vocabulary. The rest holds at least 1e-7, so
    that k tokens that sum to 1 by rounding do not make it infinite.

    >>> print(jnp.exp(with_rest(jnp.log(jnp.array([0.5, 0.25])))))
    [0.5  0.25 0.25]
    """
    total = jnp.exp(logps).sum(-1, keepdims=True)
    return jnp.concatenate([logps, jnp.log(jnp.maximum(1 - total, 1e-7))], axis=-1)


def kl(p: "Float[Array, '... V']", q: "Float[Array, '... V']") -> "Float[Array, '...']":
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of log-probabilities; tokens that p excludes (-inf) add 0.

    >>> print(kl(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.5, 0.5]))))
    0.6931472
    """
    possible = p > -jnp.inf
    log_p, log_q = jnp.where(possible, p, 0.0), jnp.where(possible, q, 0.0)
    return (jnp.where(possible, jnp.exp(log_p), 0.0) * (log_p - log_q)).sum(-1)


@distill
def forward_kl(student: "Float[Array, '... V']", teacher: "Float[Array, '... V']") -> "Float[Array, '...']":
    """KL(teacher || student): the student covers all that the teacher says.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.

    >>> print(forward_kl(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))))
    0.6931472
    """
    return kl(teacher, student)


@distill
def reverse_kl(student: "Float[Array, '... V']", teacher: "Float[Array, '... V']") -> "Float[Array, '...']":
    """KL(student || teacher): the student says only what the teacher may say.

    Gu et al. 2023, "MiniLLM: Knowledge Distillation of Large Language Models", arXiv:2306.08543, equation 1.

    >>> print(reverse_kl(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.5, 0.5]))))
    0.6931472
    """
    return kl(student, teacher)


@distill
def jsd(
    student: "Float[Array, '... V']", teacher: "Float[Array, '... V']", *, beta: float = 0.5
) -> "Float[Array, '...']":
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, p the teacher.

    At beta 0 and 1, where it is 0, its limits over beta and over 1 - beta: forward_kl at 0, reverse_kl at 1.
    Agarwal et al. 2023, "On-Policy Distillation of Language Models", arXiv:2306.13649, equation 1.

    >>> print(jsd(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))))  # nothing in common: ln 2
    0.6931472
    """
    if beta in (0, 1):
        return reverse_kl(student, teacher) if beta else forward_kl(student, teacher)
    mixture = jnp.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
