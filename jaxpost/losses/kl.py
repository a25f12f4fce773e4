"""Estimates of KL(pi || pi_ref) from samples of pi: log-probabilities of sampled tokens in, one value per token, f32.

With r = pi_ref / pi of the sampled token. Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
In a reward only the value counts, and k1 and k3 are unbiased. In a loss the gradient counts, and that of k2 alone is
the gradient of the KL, token by token and on policy: k1's is 0 on average, k3's is that of KL(pi_ref || pi). Tang and
Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL", arXiv:2506.09477.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

KL_ESTIMATORS = {}  # name in a config -> function


def estimator(function):
    """Makes `function` known to configs by its name."""
    KL_ESTIMATORS[function.__name__] = function
    return function


@estimator
def k1(policy: "Float[Array, '...']", reference: "Float[Array, '...']") -> "Float[Array, '...']":
    """-log r = log pi - log pi_ref: unbiased, often negative, of high variance.

    >>> print(k1(jnp.array([-1.0]), jnp.array([-1.5])))
    [0.5]
    """
    return policy - reference


@estimator
def k2(policy: "Float[Array, '...']", reference: "Float[Array, '...']") -> "Float[Array, '...']":
    """(log r)^2 / 2: biased, of low variance; its gradient is that of the KL.

    >>> print(k2(jnp.array([-1.0]), jnp.array([-1.5])))
    [0.125]
    """
    return 0.5 * (policy - reference) ** 2


@estimator
def k3(policy: "Float[Array, '...']", reference: "Float[Array, '...']") -> "Float[Array, '...']":
    """(r - 1) - log r: unbiased, never negative, of low variance while r is near 1.

    >>> print(k3(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([1.0]))))  # 1 - ln 2
    [0.30685282]
    """
    # Beyond 20 (a token that the policy hardly says) the value grows no more: e^20 is a KL that ends a run, not a NaN.
    log_r = jnp.clip(reference - policy, -jnp.inf, 20.0)
    return jnp.expm1(log_r) - log_r
