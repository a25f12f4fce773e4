import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpost.ops.flash as room
from jaxpost.errors import ConfigError
from jaxpost.ops.attention import Places, attention, visible
from jaxpost.ops.flash import flash_attention

T = 256
# (segment, branch, places) of a row's runs, in order; places left over are empty.
LINEAR = [(1, 0, 256)]
PACKED = [(1, 0, 100), (2, 0, 90), (3, 0, 30)]
ALIGNED = [(1, 0, 128), (2, 0, 128)]
BRANCHED = [(1, 0, 20), (1, 1, 17), (1, 2, 40), (2, 0, 70), (2, 1, 30), (2, 2, 25), (2, 3, 40)]
PROMPT = [(1, 0, 128), (1, 1, 50), (1, 2, 60)]  # a block all shared, seen by all of the next but its empty end


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a row of 256, and several parts in a group of 4."""
    monkeypatch.setattr(room, "BLOCK", 128)
    monkeypatch.setattr(room, "HEADS", 2)


def places(*rows, length=T):
    """Places of rows of runs; a branch continues from its prompt's positions."""
    segments, branches, positions = np.zeros((3, len(rows), length), np.int32)
    for b, runs in enumerate(rows):
        at, prompt = 0, 0
        for segment, branch, count in runs:
            end, start = at + count, 0 if branch == 0 else prompt
            segments[b, at:end], branches[b, at:end] = segment, branch
            positions[b, at:end] = np.arange(start, start + count)
            at, prompt = end, count if branch == 0 else prompt
    return Places(segments, branches, positions)


def inputs(B, H, K, h, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, h), (B, T, K, h), (B, T, K, h), (B, T, H, h))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


# Compiling is what takes time here.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


@functools.cache
def gradients(of, **options):
    """(queries, keys, (q, k, v), d_out) -> (out, (dq, dk, dv)), compiled once for all places."""

    def run(queries, keys, x, d_out, **first):
        out, back = jax.vjp(lambda x: of(*x, queries, keys, **options, **first), x)
        return out, back(d_out)[0]

    return jit(run)


def assert_close(found, expected):
    """1e-5 of the largest value: sums of float32 in another order."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


PLAIN = {"scale": 0.3}
BENT = {"scale": 0.5, "window": 40, "soft_cap": 2.0}  # most scores bend
NEAR = {"scale": 0.3, "window": 100}
SHAPES = {"one head a group, 128": (PLAIN, 2, 2, 128), "four, 64": (BENT, 4, 1, 64)}  # two, of size 8: slices


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [(LINEAR, PACKED), (BRANCHED, PROMPT)], ids=["linear", "branched"])
def test_equals_the_plain_form(shape, rows):
    """Output and gradients; rows end with empty places, which see each other there too."""
    options, *sizes = SHAPES[shape]
    at, (q, k, v, d_out) = places(*rows), inputs(2, *sizes)
    found = gradients(flash_attention, interpret=True, **options)(at, at, (q, k, v), d_out)
    assert_close(found, gradients(attention, **options)(at, at, (q, k, v), d_out))


def test_no_branches_is_all_shared():
    at, (q, k, v, _) = places(PACKED), inputs(1, 1, 1, 8)
    flat = Places(at.segments, None, at.positions)
    found = jit(functools.partial(flash_attention, scale=0.3, interpret=True))(q, k, v, flat, flat)
    assert_close(found, jit(functools.partial(attention, scale=0.3))(q, k, v, at, at))


def test_slices_of_a_row_equal_the_whole():
    """Queries of the second half see keys of the first, and both halves' gradients of keys and values add up."""
    at, (q, k, v, d_out) = places(BRANCHED, LINEAR), inputs(2, 4, 2, 8)
    run = gradients(flash_attention, interpret=True, **NEAR)

    def part(first):
        queries, query, cotangent = jax.tree.map(lambda x: x[:, first : first + 128], (at, q, d_out))
        return run(queries, at, (query, k, v), cotangent, first_query=jnp.int32(first))

    (out, (dq, dk, dv)), (out_, (dq_, dk_, dv_)) = part(0), part(128)
    found = np.concatenate([out, out_], 1), (np.concatenate([dq, dq_], 1), dk + dk_, dv + dv_)
    assert_close(found, gradients(attention, **NEAR)(at, at, (q, k, v), d_out))


def test_skipped_blocks_are_not_computed():
    """NaN in one document's block reaches nothing of the other's: a mask alone gives 0 * NaN."""
    at, (q, k, v, d_out) = places(ALIGNED, ALIGNED), inputs(2, 2, 2, 128)
    run = gradients(flash_attention, interpret=True, **PLAIN)
    clean = run(at, at, (q, k, v), d_out)
    early, late = (np.where((at.segments == n)[:, :, None, None], np.float32(np.nan), 0) for n in (1, 2))
    out, (dq, _, _) = run(at, at, (q, k + early, v + early), d_out)
    np.testing.assert_array_equal(out[:, 128:], clean[0][:, 128:])
    np.testing.assert_array_equal(dq[:, 128:], clean[1][0][:, 128:])
    _, (_, dk, dv) = run(at, at, (q + late, k, v), d_out + late)
    np.testing.assert_array_equal(dk[:, :128], clean[1][1][:, :128])
    np.testing.assert_array_equal(dv[:, :128], clean[1][2][:, :128])


def test_a_query_that_sees_nothing_gives_zero():
    """In a block with others that do; and so do its gradients."""
    at, (q, k, v, d_out) = places(PACKED, LINEAR), inputs(2, 2, 2, 128)
    alone = Places(np.where(at.segments == 2, 7, at.segments), at.branches, at.positions)
    out, (dq, dk, dv) = gradients(flash_attention, interpret=True, **PLAIN)(alone, at, (q, k, v), d_out)
    for x, unseen in ((out, alone), (dq, alone), (dk, at), (dv, at)):
        hidden = np.isin(unseen.segments, (2, 7)) & (np.arange(2)[:, None] == 0)
        assert np.isfinite(x).all() and not np.asarray(x)[hidden].any() and np.asarray(x)[~hidden].any()


def random_rows(count, length=1024):
    """Places of rows of documents, some with branches, of 350 tokens at most."""
    rng, rows = np.random.default_rng(1), []
    for _ in range(count):
        runs, segment = [], 1
        while (left := length - sum(n for _, _, n in runs)) > 150:
            runs.append((segment, 0, int(rng.integers(1, min(left, 350) - 100))))
            runs += [(segment, n + 1, int(rng.integers(1, 25))) for n in range(rng.integers(0, 5))]
            segment += 1
        rows.append(runs)
    return places(*rows, [(1, 0, length)], length=length)


def pairs(at, queries=slice(0, None), window=None):
    """Kind of each pair of blocks; whether any query of it sees a key, and all see all; the sights."""
    part = jax.tree.map(lambda x: x[:, queries], at)
    (B, S), length = at.segments.shape, part.segments.shape[1]
    options = room.Options(1.0, window, None, room.choose_blocks(length, S, 1, 128, 2), True)
    sights = jit(functools.partial(room._sights, options=options))(part, at, jnp.int32(queries.start))
    _, kinds = room._read(np.asarray(sights.by_queries).reshape(B, length // 128, S // 128))
    dense = np.asarray(visible(part, at, queries.start, window)).reshape(B, length // 128, 128, S // 128, 128)
    return kinds, dense.any((2, 4)), dense.all((2, 4)), sights


@pytest.mark.parametrize("queries", [slice(0, None), slice(512, 768)], ids=["row", "slice"])
def test_visited_blocks_are_those_with_something_to_see(queries):
    """As runs are in order and no prompt is empty, the least and greatest ids lose nothing."""
    kinds, some, every, _ = pairs(random_rows(6), queries)
    assert (~some).any()
    np.testing.assert_array_equal(kinds > room.SKIPPED, some)
    assert (every >= (kinds == room.WHOLE)).all()
    np.testing.assert_array_equal(kinds[-1] == room.WHOLE, every[-1])  # one document


def test_blocks_behind_the_window_are_skipped():
    at = random_rows(6)
    kinds, some, every, _ = pairs(at, window=150)
    assert ((kinds > room.SKIPPED) >= some).all() and (every >= (kinds == room.WHOLE)).all()
    # One document: of 8 blocks each sees itself, the one before, and, as 150 > 128, the one before that.
    assert (kinds[-1] > room.SKIPPED).sum() == 8 + 7 + 6
    assert (kinds > room.SKIPPED).sum() < (pairs(at)[0] > room.SKIPPED).sum()


def test_skipped_blocks_are_not_fetched():
    """The block to hold changes only where a pair is visited: as many copies as visits, one where there is none."""
    kinds, _, _, sights = pairs(random_rows(6))
    for walk, of in ((sights.by_queries, kinds), (sights.by_keys, kinds.swapaxes(1, 2))):
        held, kind = room._read(np.asarray(walk).reshape(of.shape))
        np.testing.assert_array_equal(kind, of)
        np.testing.assert_array_equal(held[of > 0], np.nonzero(of)[2])
        copies = 1 + (np.diff(held, axis=2) != 0).sum(2)
        np.testing.assert_array_equal(copies, np.maximum((of > 0).sum(2), 1))


def test_blocks_divide_and_fit(monkeypatch):
    monkeypatch.undo()
    assert room.choose_blocks(4096, 4096, 4, 128, 2) == room.Blocks(512, 512, 4)
    assert room.choose_blocks(4224, 4096, 4, 128, 2) == room.Blocks(384, 512, 4)  # 33 x 128 = 11 x 384
    assert room.choose_blocks(11, 11, 1, 8, 4) == room.Blocks(11, 11, 1)
    for G, h, itemsize in ((1, 64, 2), (8, 128, 2), (6, 256, 2), (8, 256, 4), (32, 512, 4)):
        blocks = room.choose_blocks(4096, 4096, G, h, itemsize)
        assert G % blocks.heads == 0 and 4 * blocks.heads * blocks.queries * max(h, 128) * itemsize < 12 * 2**20


def test_a_row_that_no_block_divides():
    at, x = places([(1, 0, 200)], length=200), np.zeros((1, 200, 1, 8), np.float32)
    with pytest.raises(ConfigError, match=r"batch.tokens_per_row: 200 .* multiple of 128 \(256 is the next\)"):
        flash_attention(x, x, x, at, at, scale=1.0)


def test_shapes_that_do_not_fit():
    at, (q, k, v, _) = places(LINEAR), inputs(1, 4, 2, 8)
    with pytest.raises(ValueError, match="do not fit"):
        flash_attention(q[:, :, :3], k, v, at, at, scale=1.0)


def abstract(T, h, sharding=None, B=2, H=8, K=2):
    def of(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    at = Places(*(of((B, T), jnp.int32) for _ in range(3)))
    return at, at, (of((B, T, H, h)), of((B, T, K, h)), of((B, T, K, h))), of((B, T, H, h))


@pytest.mark.parametrize("options", [PLAIN, BENT], ids=["plain", "window"])
def test_lowers_for_tpu(options, monkeypatch):
    """Mosaic takes the three kernels; what they cost is stated for the causal half."""
    monkeypatch.undo()
    run = gradients(flash_attention, **options)
    text = run.trace(*abstract(1024, 64)).lower(lowering_platforms=("tpu",)).as_text()
    for name in ("flash_forward", "flash_dq", "flash_dkv"):
        assert f'kernel_name = "{name}"' in text
    assert text.count("tpu_custom_call") == 3
    for products in (2, 3, 4):
        assert rf"\22flops\22:{products * 2 * 64 * 2 * 8 * 1024 * 1024 // 2}," in text


@pytest.mark.slow
def test_memory_on_tpu_is_linear(monkeypatch):
    """Compiled for a v5e without one: temporaries of forward and backward, rows of 2,048 and of 4,096."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.undo()
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]

    def temporaries(T):
        inputs = abstract(T, 128, jax.sharding.SingleDeviceSharding(device))
        run = gradients(flash_attention, **PLAIN).__wrapped__
        memory = jax.jit(run).lower(*inputs).compile().memory_analysis()
        return memory.peak_memory_in_bytes - memory.argument_size_in_bytes - memory.output_size_in_bytes

    short, long = temporaries(2048), temporaries(4096)
    assert 0 < long < 2.2 * short
    assert long < 141 * 2**20
