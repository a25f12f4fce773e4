"""Mixtures of experts against a loop over tokens and experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxpost.ops.experts import balance_loss, expert_load, expert_mlp, grouped_product, route, tiles

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


def mixed(x, logits, *weights, normalized=True, first=0, kernel="xla"):
    routed = route(logits, K, normalized)
    return expert_mlp(x, *routed, *weights, activation=jax.nn.silu, first_expert=first, kernel=kernel)


@pytest.fixture
def loose_promotion():
    """jax's own kernel promotes types and ranks by itself."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("normalized", [True, False])
def test_equals_a_loop(inputs, normalized):
    np.testing.assert_allclose(mixed(*inputs, normalized=normalized), loop(*inputs, normalized), rtol=1e-5, atol=1e-5)


def test_no_token_is_dropped_when_all_want_one_expert(inputs):
    x, logits, *weights = inputs
    logits = logits + np.array([50.0, 0, 0, 0], np.float32)
    np.testing.assert_allclose(mixed(x, logits, *weights), loop(x, logits, *weights, True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("e", [1, 2])
def test_shards_of_the_experts_add_up(inputs, e):
    """Of one expert each, a shard has fewer experts than a token."""
    x, logits, *weights = inputs
    parts = [mixed(x, logits, *(w[first : first + e] for w in weights), first=first) for first in range(0, E, e)]
    np.testing.assert_allclose(sum(parts), mixed(*inputs), rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_a_dense_form(inputs):
    """Where every expert is computed for every token, and the weights pick."""
    gradients_are_right(inputs, mixed)


def test_gradients_by_the_kernel_over_a_mesh(inputs, loose_promotion):
    """One expert a device, the tokens of all: what belongs to other devices' experts leaves no trace."""
    mesh = jax.make_mesh((E,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:E])
    spread, whole = PartitionSpec("expert"), PartitionSpec()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(whole, whole, spread, spread, spread), out_specs=whole, check_vma=False
    )
    def sharded(x, logits, *weights):
        out = mixed(x, logits, *weights, first=jax.lax.axis_index("expert"), kernel="interpret")
        return jax.lax.psum(out, "expert")

    gradients_are_right(inputs, sharded)


def gradients_are_right(inputs, form):
    """Those of `form` equal those of a dense one."""

    def dense(x, logits, gate, up, down):
        weights, experts = route(logits, K, True)
        hits = jax.nn.one_hot(experts, E, dtype=jnp.float32) * weights[..., None]
        hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x, gate)) * jnp.einsum("nd,edf->nef", x, up)
        return jnp.einsum("nef,efd,nke->nd", hidden, down, hits)

    target = np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)
    every = tuple(range(5))
    found, expected = (jax.jit(jax.grad(lambda *a, f=f: (f(*a) * target).sum(), every))(*inputs) for f in (form, dense))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rows, sizes, dtype",
    [
        (21, [5, 0, 9], "float32"),  # an empty group, rows of none, no multiple of anything
        (9, [0, 0, 0], "float32"),
        (300, [70, 0, 230], "bfloat16"),  # three tiles of 128 rows, all of a group
    ],
)
def test_the_kernel_equals_ragged_dot(loose_promotion, rows, sizes, dtype):
    """Product and gradients; the gradient that arrives is not 0 where rows have no group."""
    rng, groups = np.random.default_rng(0), jnp.array(sizes, jnp.int32)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    x, weights, target = draw(rows, D), draw(len(sizes), D, F), draw(rows, F)

    @functools.partial(jax.jit, static_argnums=0)
    def both(kernel, x, weights):
        out, back = jax.vjp(lambda *a: grouped_product(*a, groups, kernel=kernel), x, weights)
        return out, *back(target)

    found = both("interpret", x, weights)
    for a, b in zip(found, both("xla", x, weights), strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), atol=1e-5, rtol=2**-8)
    for a in found[:2]:
        assert not np.any(a[sum(sizes) :])


def test_tiles():
    assert tiles(32768, 2048, 768) == (128, 2048, 384)  # Qwen3-30B-A3B: up, and down
    assert tiles(32768, 768, 2048) == (128, 768, 1024)
    assert tiles(4096, 14336, 4096) == (512, 1024, 512)  # Mixtral 8x7B
    assert tiles(16, D, F) == (16, D, F)


def test_an_unknown_kernel(inputs):
    with pytest.raises(ValueError, match="mosaic"):
        mixed(*inputs, kernel="mosaic")


@pytest.mark.slow
def test_gradients_compile_for_tpu_without_products_of_other_groups(tpu, loose_promotion):
    """The compiler counts one product a row, forward and for either gradient, whatever the number of experts."""
    M, m, n, e = 1024, 256, 128, 8
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=tpu)  # noqa: E731

    def step(rows, weights, sizes, target):
        out, back = jax.vjp(lambda *a: grouped_product(*a, sizes, kernel="pallas"), rows, weights)
        return out, *back(target)

    arguments = of("bfloat16", M, m), of("bfloat16", e, m, n), of("int32", e), of("bfloat16", M, n)
    compiled = jax.jit(step).lower(*arguments).compile()
    assert 3.0 <= compiled.cost_analysis()["flops"] / (2 * M * m * n) < 3.2


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
