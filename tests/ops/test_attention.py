import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpost.ops.attention as room
from jaxpost.ops.attention import Places, attention, cached_attention

B, T, H, K, h = 2, 11, 4, 2, 8
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0]], np.int32)
BRANCHES = np.array([[0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 2, 3, 0, 1, 2, 0, 0], [0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 0]], np.int32)
PLACES = Places(SEGMENTS, BRANCHES, POSITIONS)


def inputs(T=T, S=T):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((B, T, H, h), (B, S, K, h), (B, S, K, h)))


def oracle(q, k, v, places, scale, window=None, soft_cap=None):
    """One query, one head, one key at a time."""
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            keys = [j for j in range(i + 1) if sees(places, b, i, j, window)]
            for n in range(q.shape[2]):
                head = n // (q.shape[2] // k.shape[2])
                scores = [scale * float(q[b, i, n] @ k[b, j, head]) for j in keys]
                if soft_cap:
                    scores = [soft_cap * math.tanh(s / soft_cap) for s in scores]
                weights = np.exp(np.array(scores) - max(scores))
                out[b, i, n] = sum(w * v[b, j, head] for w, j in zip(weights / weights.sum(), keys, strict=True))
    return out


def sees(places, b, i, j, window):
    near = window is None or places.positions[b, i] - places.positions[b, j] < window
    branch = places.branches[b, j] in (0, places.branches[b, i])
    return near and branch and places.segments[b, i] == places.segments[b, j]


@pytest.mark.parametrize("chunk", [3, 128])
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"soft_cap": 0.7}])
def test_equals_a_loop(monkeypatch, chunk, options):
    monkeypatch.setattr(room, "CHUNK", chunk)
    q, k, v = inputs()
    found = attention(q, k, v, PLACES, PLACES, scale=0.3, **options)
    np.testing.assert_allclose(found, oracle(q, k, v, PLACES, 0.3, **options), atol=1e-5)


def test_no_chunk_is_left_out_of_a_long_row(monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 2)
    monkeypatch.setattr(room, "MOST_CHUNKS", 2)  # 11 queries: chunks of 6 and 5
    q, k, v = inputs()
    np.testing.assert_allclose(attention(q, k, v, PLACES, PLACES, scale=0.3), oracle(q, k, v, PLACES, 0.3), atol=1e-5)


def test_gradients_do_not_depend_on_the_chunks(monkeypatch):
    def gradients(chunk):
        monkeypatch.setattr(room, "CHUNK", chunk)
        return jax.jit(jax.grad(lambda x: (attention(*x, PLACES, PLACES, scale=0.3) ** 2).sum()))(inputs())

    for one, many in zip(gradients(128), gradients(3), strict=True):
        np.testing.assert_allclose(one, many, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_to_a_cache_in_any_order_equals_a_whole_row(window):
    """A row of one document; its keys stand in the cache as a ring would hold them, one slot is empty."""
    q, k, v = (x[:1] for x in inputs())
    T = q.shape[1]
    at = np.arange(T, dtype=np.int32)[None]
    places = Places(np.ones_like(at), None, at)
    options = {"scale": 0.3, "window": window, "soft_cap": 5.0}
    whole = attention(q, k, v, places, places, **options)
    order = np.roll(np.arange(T), 3)
    kept = [np.concatenate([z[:, order], np.full_like(z[:, :1], 9.0)], 1).swapaxes(1, 2) for z in (k, v)]
    positions = np.concatenate([order, [-2]])[None].astype(np.int32)
    found = cached_attention(q[:, T - 3 :], *kept, at[:, T - 3 :], positions, **options)
    np.testing.assert_allclose(found, whole[:, T - 3 :], atol=1e-6)


def test_no_branches_is_all_shared():
    q, k, v = inputs()
    flat = Places(SEGMENTS, np.zeros_like(BRANCHES), POSITIONS)
    none = Places(SEGMENTS, None, POSITIONS)
    np.testing.assert_array_equal(attention(q, k, v, none, none, scale=0.3), attention(q, k, v, flat, flat, scale=0.3))


def test_a_query_that_sees_nothing_is_finite():
    q, k, v = inputs()
    alone = Places(SEGMENTS + 5, None, POSITIONS)
    out = attention(q, k, v, alone, Places(SEGMENTS, None, POSITIONS), scale=0.3)
    assert np.isfinite(out).all()


def test_softmax_is_f32_under_bf16():
    """Scores near 200 differ by less than a bf16 step there (1.0): rounding them would lose the order."""
    q = jnp.full((1, 2, 1, 1), 14.0, jnp.bfloat16)
    k = jnp.array([14.25, 14.3125], jnp.bfloat16).reshape(1, 2, 1, 1)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    places = Places(np.ones((1, 2), np.int32), None, np.arange(2, dtype=np.int32)[None])
    out = attention(q, k, v, places, places, scale=1.0)
    assert float(out[0, 1, 0, 0]) == pytest.approx(1 / (1 + math.exp(-14 * 0.0625)), abs=4e-3)


def test_shapes_that_do_not_fit():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:, :, :3], k, v, PLACES, PLACES, scale=0.3)
