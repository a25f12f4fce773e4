"""The loss of a value model: values and returns of tokens in, one value per token out, f32.

V_t is the value of the state before token t, R_t the return from token t on. Arrays are [C, T] or packed rows [B, T].
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def squared_error(
    values: "Float[Array, '...']",
    old_values: "Float[Array, '...']",
    returns: "Float[Array, '...']",
    *,
    clip_range: float | None = 0.2,
) -> "Float[Array, '...']":
    """max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) / 2; None: no clipping.

    V_old is the value at the start of the update. Huang et al. 2022, "The 37 Implementation Details of
    Proximal Policy Optimization" (ICLR blog track), detail 9.

    >>> print(squared_error(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0]), clip_range=0.5))  # (0.5 - 1)^2 / 2
    [0.125]
    """
    free, held = _errors(values, old_values, returns, clip_range)
    return 0.5 * jnp.maximum(free, held)


def is_clipped(
    values: "Float[Array, '...']",
    old_values: "Float[Array, '...']",
    returns: "Float[Array, '...']",
    *,
    clip_range: float | None = 0.2,
) -> "Float[Array, '...']":
    """1 where `squared_error` of the same arguments is that of the clipped value, and so has no gradient; else 0.

    >>> print(is_clipped(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0])))
    [1.]
    """
    free, held = _errors(values, old_values, returns, clip_range)
    return (held > free).astype(free.dtype)


def _errors(values, old_values, returns, clip_range):
    """Squared errors of the value and of the clipped value."""
    held = values if clip_range is None else jnp.clip(values, old_values - clip_range, old_values + clip_range)
    return (values - returns) ** 2, (held - returns) ** 2
