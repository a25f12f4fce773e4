"""Masked statistics against numpy on what the mask holds."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops import masked

MASK = np.float32([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1]])


def values(seed: int = 0):
    return np.random.default_rng(seed).normal(2.0, 3.0, MASK.shape).astype(np.float32)


def test_moments():
    mean, variance = masked.moments(jnp.array(values()), jnp.array(MASK))
    held = values()[MASK > 0]
    np.testing.assert_allclose([mean, variance], [held.mean(), held.var(ddof=1)], rtol=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean):
    """What stands outside the mask, NaN too, changes nothing and becomes 0."""
    x = jnp.where(MASK > 0, values(), jnp.nan)
    ours, held = np.asarray(masked.whiten(x, jnp.array(MASK), shift_mean=shift_mean)), values()[MASK > 0]
    expected = (held - held.mean()) / held.std(ddof=1) + (0 if shift_mean else held.mean())
    np.testing.assert_allclose(ours[MASK > 0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours[MASK == 0], 0)


@pytest.mark.parametrize("mask", [np.zeros(3), np.array([0, 1, 0]), np.ones(3)])
def test_whitening_of_nothing_one_and_equals_is_zero(mask):
    ours = masked.whiten(jnp.full(3, 0.5), jnp.float32(mask))
    np.testing.assert_array_equal(ours, 0)


def test_where_completions_go_on_and_end():
    mask = jnp.array(MASK)
    np.testing.assert_array_equal(masked.continues(mask), [[1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(masked.last_places(mask), [[0, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 1]])
