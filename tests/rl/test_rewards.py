"""Rewards of tokens, running moments and the KL's coefficient, against loops and hand arithmetic."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops.completions import at_tokens
from jaxpost.rl import controllers, rewards
from jaxpost.types import Rows


@pytest.mark.parametrize("module", [rewards, controllers])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_the_score_stands_at_the_last_token():
    """The last one of the completion: neither the padding after it nor, where there is none, anywhere before."""
    mask = jnp.float32([[1, 1, 0, 0], [1, 1, 1, 1]])
    kl = jnp.where(mask > 0, 0.5, jnp.nan)
    ours = rewards.token_rewards(jnp.array([[3.0], [-2.0]]), kl, mask, kl_coef=0.1)
    np.testing.assert_allclose(ours, [[-0.05, 2.95, 0, 0], [-0.05, -0.05, -0.05, -2.05]], rtol=1e-6)


def test_packed_rows_have_the_rewards_of_a_completion_a_row():
    segments = jnp.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0]])
    branches = jnp.array([[0, 1, 1, 1, 2, 2, 2, 0, 1, 1, 0]])
    mask = jnp.float32([[0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0]])
    rows = Rows(segments, segments, branches, segments, mask)
    scores = jnp.array([[[1.0, 2.0], [3.0, 0.0]]])
    ours = rewards.token_rewards(at_tokens(scores, rows), jnp.ones_like(mask), mask, kl_coef=0.5)
    np.testing.assert_allclose(ours, [[0, 0, -0.5, 0.5, 0, -0.5, 1.5, 0, 0, 2.5, 0]])


def test_running_moments_are_those_of_all_scores_so_far():
    """Whatever the batches, and what a mask leaves out."""
    draw = np.random.default_rng(0)
    scores = draw.normal(5.0, 3.0, 40).astype(np.float32)
    seen, observe = rewards.Moments.none(), jax.jit(rewards.observe)
    for batch in np.split(scores, [1, 1, 9, 30]):
        longer = jnp.concatenate([batch, jnp.array([jnp.nan])])
        seen = observe(seen, longer, jnp.float32(np.arange(len(longer)) < len(batch)))
    np.testing.assert_allclose([seen.count, seen.mean, seen.std], [40, scores.mean(), scores.std(ddof=1)], rtol=1e-5)
    normal = rewards.normalize(jnp.array(scores), seen)
    np.testing.assert_allclose([normal.mean(), normal.std(ddof=1)], [0, 1], atol=1e-5)
    np.testing.assert_allclose(rewards.normalize(scores, seen, center=False), scores / scores.std(ddof=1), rtol=1e-5)


@pytest.mark.parametrize("scores", [[], [2.0], [2.0, 2.0]])
def test_scores_that_do_not_differ_are_only_centred(scores):
    seen = rewards.observe(rewards.Moments.none(), jnp.float32(scores))
    np.testing.assert_array_equal(seen.std, 1)
    np.testing.assert_array_equal(rewards.normalize(jnp.float32(scores), seen), np.zeros(len(scores)))


def test_the_coefficient_brings_the_kl_to_its_target():
    """On a policy whose KL is 1 / coefficient: from far above and far below, and fixed stays."""
    for start in (10.0, 0.001):
        coefficient = jnp.float32(start)
        step = jax.jit(lambda c: controllers.adaptive(c, 1 / c, target=4.0))
        for _ in range(600):
            coefficient = step(coefficient)
        np.testing.assert_allclose(coefficient, 0.25, rtol=1e-3)
    np.testing.assert_allclose(controllers.adaptive(jnp.float32(1), jnp.float32(4.4), target=4.0), 1.01, rtol=1e-6)
    np.testing.assert_allclose(controllers.adaptive(jnp.float32(1), jnp.float32(0), target=4.0), 0.98, rtol=1e-6)
    assert controllers.fixed(jnp.float32(0.5), jnp.float32(9.0)) == 0.5
