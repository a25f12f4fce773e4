"""Mixtures of experts against a loop over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops.experts import balance_loss, expert_load, expert_mlp, route

N, D, F, E, K = 11, 6, 5, 4, 2


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(N, D), draw(N, E), draw(E, D, F), draw(E, D, F), draw(E, F, D)


def loop(x, logits, gate, up, down, normalized, activation=jax.nn.silu):
    """Token by token, in f64."""
    out = np.zeros(x.shape)
    for n in range(len(x)):
        probs = np.exp(logits[n].astype(np.float64))
        probs /= probs.sum()
        chosen = np.argsort(-probs, kind="stable")[:K]
        scale = probs[chosen].sum() if normalized else 1.0
        for e in chosen:
            hidden = np.asarray(activation(x[n] @ gate[e])) * (x[n] @ up[e])
            out[n] += probs[e] / scale * (hidden @ down[e])
    return out


def mixed(x, logits, *weights, normalized=True, first=0):
    return expert_mlp(x, *route(logits, K, normalized), *weights, activation=jax.nn.silu, first_expert=first)


@pytest.mark.parametrize("normalized", [True, False])
def test_equals_a_loop(inputs, normalized):
    np.testing.assert_allclose(mixed(*inputs, normalized=normalized), loop(*inputs, normalized), rtol=1e-5, atol=1e-5)


def test_no_token_is_dropped_when_all_want_one_expert(inputs):
    x, logits, *weights = inputs
    logits = logits + np.array([50.0, 0, 0, 0], np.float32)
    np.testing.assert_allclose(mixed(x, logits, *weights), loop(x, logits, *weights, True), rtol=1e-5, atol=1e-5)


def test_shards_of_the_experts_add_up(inputs):
    x, logits, *weights = inputs
    halves = [mixed(x, logits, *(w[first : first + 2] for w in weights), first=first) for first in (0, 2)]
    np.testing.assert_allclose(sum(halves), mixed(*inputs), rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_a_dense_form(inputs):
    """Where every expert is computed for every token, and the weights pick."""

    def dense(x, logits, gate, up, down):
        weights, experts = route(logits, K, True)
        hits = jax.nn.one_hot(experts, E, dtype=jnp.float32) * weights[..., None]
        hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x, gate)) * jnp.einsum("nd,edf->nef", x, up)
        return jnp.einsum("nef,efd,nke->nd", hidden, down, hits)

    target = np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)
    every = tuple(range(5))
    found, expected = (jax.grad(lambda *a, f=f: (f(*a) * target).sum(), every)(*inputs) for f in (mixed, dense))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_balance_by_hand():
    """Two tokens, two experts, one each: even load gives k = 1; both to one expert gives E * P of that expert."""
    even = jnp.array([[[[4.0, 0.0], [0.0, 4.0]]]])
    p = 1 / (1 + np.exp(-4.0))
    mask = jnp.ones((1, 2), jnp.float32)
    np.testing.assert_allclose(balance_loss(even, 1, mask), 1.0, rtol=1e-6)
    same = jnp.array([[[[4.0, 0.0], [4.0, 0.0]]]])
    np.testing.assert_allclose(balance_loss(same, 1, mask), 2 * p, rtol=1e-6)
    np.testing.assert_array_equal(expert_load(same, 1, mask), [[1.0, 0.0]])
    np.testing.assert_allclose(balance_loss(even, 1, mask.at[0, 1].set(0.0)), 2 * p, rtol=1e-6)  # one token counts


def test_layers_are_balanced_together():
    """Layer one all to expert 0, layer two all to expert 1: together even, as in transformers."""
    logits = jnp.array([[[[9.0, 0.0]]], [[[0.0, 9.0]]]])
    np.testing.assert_allclose(balance_loss(logits, 1, jnp.ones((1, 1), jnp.float32)), 1.0, rtol=1e-6)
