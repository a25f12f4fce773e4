"""Chunked token log-probabilities against the full [B, T, V] form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops.logprobs import Head, row_logps, token_logps
from jaxpost.types import Rows

B, T, D, V = 3, 11, 8, 37


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    weight, bias = rng.normal(size=(V, D)).astype(np.float32), rng.normal(size=V).astype(np.float32)
    targets, scored = rng.integers(0, V, (B, T)).astype(np.int32), rng.random((B, T)) < 0.4
    cotangents = rng.normal(size=(2, B, T)).astype(np.float32)
    return hidden, weight, bias, targets, scored, cotangents


def full(hidden, head, targets, temperature):
    """The same with all logits at once: logps and entropy [B, T]."""
    z = (hidden @ head.weight.T + (0 if head.bias is None else head.bias[None, None])) * head.scale
    if head.soft_cap is not None:
        z = head.soft_cap * jnp.tanh(z / head.soft_cap)
    logp = jax.nn.log_softmax(z / temperature)
    picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return picked, -(jnp.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 7, 12, 1000])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 3.0, "scale": 0.5, "with_bias": True}])
def test_chunked_equals_full_values_and_gradients(arrays, chunk, options):
    hidden, weight, bias, targets, scored, (c, d) = arrays
    options = dict(options)
    bias = bias if options.pop("with_bias", False) else None

    def chunked_sum(hidden, weight, bias):
        stats = token_logps(hidden, Head(weight, bias, **options), targets, scored, temperature=0.7, chunk=chunk)
        return (c * stats.logps + d * stats.entropy).sum(), (stats.logps, stats.entropy)

    def full_sum(hidden, weight, bias):
        logps, entropy = full(hidden, Head(weight, bias, **options), targets, 0.7)
        logps, entropy = jnp.where(scored, logps, 0), jnp.where(scored, entropy, 0)
        return (c * logps + d * entropy).sum(), (logps, entropy)

    argnums = (0, 1) if bias is None else (0, 1, 2)
    grads, values = jax.jit(jax.grad(chunked_sum, argnums, has_aux=True))(hidden, weight, bias)
    wanted_grads, wanted = jax.grad(full_sum, argnums, has_aux=True)(hidden, weight, bias)
    for ours, theirs in zip(jax.tree.leaves((values, grads)), jax.tree.leaves((wanted, wanted_grads)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_head_gradient_accumulates_in_f32(arrays):
    """Trap 5: a bf16 accumulator over many chunks is 2 % off; the gradient below is exact up to bf16's own rounding."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(1, 512, 16)).astype(jnp.bfloat16)
    weight = rng.normal(size=(64, 16)).astype(jnp.bfloat16)
    targets = rng.integers(0, 64, (1, 512)).astype(np.int32)

    def loss(weight, hidden, chunk):
        return token_logps(hidden, Head(weight), targets, chunk=chunk).logps.sum()

    def error(chunk):
        exact = jax.grad(loss)(jnp.asarray(weight, jnp.float32), jnp.asarray(hidden, jnp.float32), 512)
        ours = jax.grad(loss)(jnp.asarray(weight), jnp.asarray(hidden), chunk)
        return np.linalg.norm(np.asarray(ours, np.float32) - exact) / np.linalg.norm(exact)

    assert error(chunk=2) < 0.004


def test_unscored_positions_are_never_computed(arrays):
    """The number of chunks follows the scored positions: an infinite hidden state elsewhere leaves no trace."""
    hidden, weight, _, targets, scored, _ = arrays
    poisoned = np.where(scored[..., None], hidden, np.inf)
    clean, stats = (token_logps(h, Head(weight), targets, scored, chunk=3) for h in (hidden, poisoned))
    np.testing.assert_array_equal(stats.logps, clean.logps)
    grads = jax.grad(lambda h: token_logps(h, Head(weight), targets, scored, chunk=3).logps.sum())(poisoned)
    assert np.isfinite(grads[scored]).all() and (np.asarray(grads)[~scored] == 0).all()


def test_no_array_of_all_logits(arrays):
    """Nothing in forward or backward has as many elements as [B, T, V]."""
    hidden, weight, _, targets, _, _ = arrays
    grad = jax.grad(lambda h, w: token_logps(h, Head(w), targets, chunk=B * 2).logps.sum(), (0, 1))
    text = jax.jit(grad).lower(hidden, weight).as_text()
    assert f"<{B * 2}x{V}xf32>" in text
    assert f"{B}x{T}x{V}x" not in text and f"<{B * T}x{V}x" not in text


def test_rows_are_scored_by_the_token_before(arrays):
    hidden, weight, _, tokens, _, _ = arrays
    weights = np.zeros((B, T), np.float32)
    weights[0, 3], weights[1, 1:], weights[2, T - 1] = 1, 0.5, 2
    zeros = np.zeros((B, T), np.int32)
    stats = row_logps(hidden, Head(weight), Rows(tokens, zeros, zeros, zeros, weights), chunk=4)
    every, _ = full(hidden[:, :-1], Head(weight), tokens[:, 1:], 1.0)
    wanted = np.where(weights != 0, np.pad(every, ((0, 0), (1, 0))), 0)
    np.testing.assert_allclose(stats.logps, wanted, atol=1e-5)
    with pytest.raises(ValueError, match=r"targets \[B, T\]"):
        token_logps(hidden[0], Head(weight), tokens)
