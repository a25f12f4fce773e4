"""The kernel of decoding, interpreted, against the plain form over all slots of the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpost.ops.decode as room
from jaxpost.models.cache import KV, extend, key_positions
from jaxpost.models.cache import plain as read
from jaxpost.ops.attention import cached_attention
from jaxpost.ops.decode import block_slots, decode_attention, visits

K, G, h, S = 2, 3, 8, 36
LENGTHS = np.array([4, 0, 20, 36, 77, 0], np.int32)  # part, free, part, full, twice around, free


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five blocks of 8 slots, the last of which is half outside."""
    monkeypatch.setattr(room, "BLOCKS", (8, 8))


def inputs(T=1, S=S, lengths=LENGTHS):
    """(q, k, v, positions, lengths): the T newest tokens of each row ask; free rows have none."""
    rng = np.random.default_rng(0)
    B = len(lengths)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    positions = np.where(lengths[:, None] == 0, -1, lengths[:, None] - T + np.arange(T)).astype(np.int32)
    return draw(B, T, K * G, h), draw(B, K, S, h), draw(B, K, S, h), jnp.asarray(positions), jnp.asarray(lengths)


@functools.partial(jax.jit, static_argnames=("window", "soft_cap"))
def kernel(q, k, v, positions, lengths, **options):
    return decode_attention(q, k, v, positions, lengths, scale=0.3, interpret=True, **options)


@functools.partial(jax.jit, static_argnames=("window", "soft_cap"))
def plain(q, k, v, positions, lengths, **options):
    return cached_attention(q, k, v, positions, key_positions(lengths, k.shape[2]), scale=0.3, **options)


def equal_where_there_are_tokens(found, expected, positions, atol=1e-6):
    there = np.asarray(positions) >= 0
    assert there.any() and np.isfinite(found).all()
    np.testing.assert_allclose(found[there], expected[there], atol=atol)


@pytest.mark.parametrize("T, options", [(1, {}), (3, {"window": 30, "soft_cap": 0.7})])
def test_equals_the_plain_form(T, options):
    found = kernel(*inputs(T), **options)
    equal_where_there_are_tokens(found, plain(*inputs(T), **options), inputs(T)[3])


def test_every_turn_of_a_ring():
    """Rings of 19 slots that are a token longer from row to row, over more than two rounds."""
    window = 17
    lengths = np.arange(1, 44, dtype=np.int32)
    found = kernel(*inputs(1, 19, lengths), window=window)
    np.testing.assert_allclose(found, plain(*inputs(1, 19, lengths), window=window), atol=1e-6)


def test_a_piece_with_places_that_hold_no_token():
    """Rows that end within the three places of a call: -1 after their last."""
    q, k, v, _, _ = inputs(3, lengths=LENGTHS[:3])
    positions, lengths = jnp.array([[8, 9, -1], [0, -1, -1], [39, 40, 41]], jnp.int32), jnp.array([10, 1, 42])
    found = kernel(q, k, v, positions, lengths, window=6)
    equal_where_there_are_tokens(found, plain(q, k, v, positions, lengths, window=6), positions)


def test_int8_equals_the_plain_form_of_the_same_integers():
    q, k, v, positions, lengths = inputs()
    shape, scales = k.shape, tuple(jnp.zeros(k.shape[:3], jnp.float32) for _ in "kv")
    kv = KV(jnp.zeros(shape, jnp.int8), jnp.zeros(shape, jnp.int8), scales)
    slots = jnp.tile(jnp.arange(S, dtype=jnp.int32), (len(lengths), 1))
    write = jax.jit(lambda kv, k, v: extend(kv, None, k.swapaxes(1, 2), v.swapaxes(1, 2), slots))
    kv = write(kv, k, v)
    k, v = read(kv, None, "float32")
    found = kernel(q, kv.k, kv.v, positions, lengths, scales=kv.scales)
    equal_where_there_are_tokens(found, plain(q, k, v, positions, lengths), positions, atol=1e-5)


def test_a_stacked_cache_is_read_at_a_traced_layer():
    q, k, v, positions, lengths = inputs()
    stack = lambda x: jnp.stack([x + 1, x, x - 1])  # noqa: E731
    scales = tuple(abs(x.mean(axis=3)) for x in (k, v))
    expected = [x * scale[..., None] for x, scale in zip((k, v), scales, strict=True)]
    stacked = {"scales": jax.tree.map(stack, scales), "layer": jnp.int32(1)}
    found = kernel(q, stack(k), stack(v), positions, lengths, **stacked)
    equal_where_there_are_tokens(found, plain(q, *expected, positions, lengths), positions, atol=1e-5)


def test_blocks_that_no_query_sees_are_not_read():
    """They hold NaN here, which any use of them would spread."""
    q, k, v, positions, lengths = inputs()
    window = 5
    at = np.asarray(key_positions(lengths, S))
    seen = (at >= 0) & (at > np.asarray(lengths)[:, None] - 1 - window)
    of_block = np.arange(S) // 8
    fetched = (seen[:, None] & (of_block == of_block[:, None])[None]).any(axis=2)
    assert 0 < fetched.sum() < fetched.size / 2
    spoiled = [jnp.where(fetched[:, None, :, None], x, jnp.nan) for x in (k, v)]
    found = kernel(q, *spoiled, positions, lengths, window=window)
    equal_where_there_are_tokens(found, plain(q, k, v, positions, lengths, window=window), positions)


def test_visits_by_hand():
    """Four blocks of 8 slots: one token; a free row; half; once around, with all blocks; then only a window of it."""
    lengths = jnp.array([1, 0, 17, 35, 0], jnp.int32)
    at = jnp.where(lengths > 0, lengths - 1, -1)[:, None]
    where = jax.jit(visits, static_argnums=(2, 3, 4))
    nearest, first, count = where(at, lengths, 32, 8, None)
    np.testing.assert_array_equal(count, [1, 0, 3, 4, 0])
    np.testing.assert_array_equal(nearest, [0, 2, 2, 3, 4])  # a free row waits with the block of the next one
    np.testing.assert_array_equal(first[jnp.array([0, 2, 3])], [0, 0, 0])
    _, first, count = where(at, lengths, 32, 8, 5)  # tokens 30 to 34 stand in slots 30, 31, 0, 1, 2
    np.testing.assert_array_equal(count, [1, 0, 2, 2, 0])
    np.testing.assert_array_equal(first[jnp.array([0, 2, 3])], [0, 1, 3])


def test_blocks_hold_about_a_step(monkeypatch):
    monkeypatch.undo()
    assert block_slots(2048, 2 * 8 * 128 * 2, 32) == 256  # Llama 3.1 8B in bf16
    assert block_slots(2048, 2 * 8 * 128, 32) == 512  # in int8
    assert block_slots(8192, 2 * 1 * 128 * 2, 4) == 2048  # its heads over eight devices
    assert block_slots(8192, 2 * 32 * 256 * 2, 32) == 128
    assert block_slots(100, 2 * 8 * 128 * 2, 32) == 100


def test_shapes_that_do_not_fit():
    q, k, v, positions, lengths = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        kernel(q[:, :, :5], k, v, positions, lengths)


@pytest.mark.parametrize("kind, layers", [("bfloat16", None), ("int8", 4)])
def test_compiles_for_tpu_without_a_copy_of_the_cache(monkeypatch, tpu, kind, layers):
    """A layer of Llama 3.1 8B, 64 rows of 2,048 slots: 512 MiB of keys and values in bf16, and none of it copied."""
    monkeypatch.undo()
    B, K, H, S, h = 64, 8, 32, 2048, 128
    stack = () if layers is None else (layers,)
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=tpu)  # noqa: E731
    cache, scales = of(kind, *stack, B, K, S, h), None
    if kind == "int8":
        scales = (of("float32", *stack, B, K, S),) * 2

    def step(q, k, v, positions, lengths, scales, layer):
        return decode_attention(q, k, v, positions, lengths, scale=h**-0.5, scales=scales, layer=layer)

    layer = None if layers is None else of("int32")
    arguments = of("bfloat16", B, 1, H, h), cache, cache, of("int32", B, 1), of("int32", B), scales, layer
    compiled = jax.jit(step).lower(*arguments).compile()
    assert "decode_attention" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20
