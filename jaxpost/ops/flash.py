"""Attention over packed, branching rows as TPU kernels: what `ops.attention.attention` means, in linear memory.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): blocks of queries and keys, a running maximum and sum, scores computed
again in the backward pass. Three kernels: forward, dq, dkv. Inside, everything lies keys by queries, so that what there
is one of a query (maximum, sum, delta) is a row of lanes: it is kept as [1, queries] and reduced over sublanes. Scores
are in base 2: the factor log2(e) joins the scale, and exp2 is what the hardware has.

Which keys a query sees is said by one id a position, segment * 4096 + branch: the same id, or the id of the
segment's shared prompt (branch 0). A pair of blocks is skipped, neither computed nor fetched, where the least and the
greatest id of both, their places in the row and their positions (windows) say that no query of the one sees a key of
the other; where they say that every query sees every key, no mask is computed.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpost.errors import ConfigError
from jaxpost.types import Array, record

if TYPE_CHECKING:  # ops.attention is what calls this
    from jaxpost.ops.attention import Places

LANES = 128
BLOCK = 512  # the most queries, and keys, of a block
HEADS = 4  # the most query heads of a step: their loop is unrolled, and compiling takes as much longer
VMEM = 12 * 2**20  # bytes of a step as `choose_blocks` counts them; a v4 core has 16 MiB
BRANCHES = 4096  # ids a segment
EMPTY = 2**19 - 1  # the segment of empty places: they end a row, so blocks' least and greatest ids stay apart
LOWEST = -1e30  # the maximum of no scores; finite, so that differences of two are
MASKED = -2e30  # exp2(MASKED - m) is 0 for every maximum m, LOWEST too
LOG2E = math.log2(math.e)
SKIPPED, MASKING, WHOLE = 0, 1, 2  # kinds of a pair of blocks

_KEYS_BY_QUERIES = (((1,), (1,)), ((), ()))  # [keys, h] x [queries, h]
_OVER_KEYS = (((0,), (0,)), ((), ()))  # [keys, h] x [keys, queries] -> [h, queries]
_OVER_QUERIES = (((1,), (0,)), ((), ()))  # [keys, queries] x [queries, h]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a step of a kernel holds: queries, keys, and heads of one key head's group."""

    queries: int
    keys: int
    heads: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What a kernel is compiled for."""

    scale: float
    window: int | None
    soft_cap: float | None
    blocks: Blocks
    interpret: bool


@record
class Sights:
    """Who sees whom. `by_queries` and `by_keys` are walks (`_walk`) of the pairs of blocks [B, T/queries, S/keys]."""

    query_places: Array  # int32[B, R, T]: ids and, under a window (R = 2), positions
    key_places: Array  # int32[B, R, S]
    first_query: Array  # int32[1]
    by_queries: Array  # int32[B * T/queries * S/keys]
    by_keys: Array  # the same, keys outside


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    queries: "Places",
    keys: "Places",
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    first_query: int | Array = 0,
    interpret: bool = False,
) -> Array:
    """`ops.attention.attention` [B, T, H, h] by kernels, differentiable in q, k and v.

    Args:
      q: [B, T, H, h], bfloat16 or float32; query head n reads key head n // (H / K).
      k, v: [B, S, K, h], like q.
      queries, keys: places of the T queries and the S keys; branches below 4096, segments below 524,287.
      scale: factor on the scores before `soft_cap`.
      window: a query sees keys less than this many positions back.
      first_query: row index of the first query, int or int32[], where the queries are a slice of the keys' row.
      interpret: run the kernels as plain operations, on any backend.

    A query that sees no key gives 0 (a row has none: every place sees itself).

    Raises:
      ConfigError: T or S is neither below 128 nor a multiple of 128.
    """
    B, T, H, h = q.shape
    S, K = k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != h or H % K:
        raise ValueError(f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit [B, T, H, h], [B, S, K, h]")
    blocks = choose_blocks(T, S, H // K, h, q.dtype.itemsize)
    options = Options(scale, window, soft_cap, blocks, interpret)
    q = q.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
    out = _flash(options, q, k.swapaxes(1, 2), v.swapaxes(1, 2), _sights(queries, keys, first_query, options))
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)


def choose_blocks(T: int, S: int, G: int, h: int, itemsize: int) -> Blocks:
    """Blocks of T queries and S keys with G query heads a key head, head size h and `itemsize` bytes a number.

    The largest multiples of 128 up to BLOCK that divide T and S (all of fewer than 128), then as many heads of the
    group as fit beside them: a mask is computed once for all of them. What a step holds is counted for dkv, the
    largest: blocks of the inputs and outputs twice (one is computed on while another is copied), sums in f32, and five
    temporaries of the size of the scores.
    """
    width = -(-h // LANES) * LANES
    for most in range(BLOCK, 0, -LANES):
        bq, bk = _divisor(T, most), _divisor(S, most)
        for heads in (n for n in range(min(G, HEADS), 0, -1) if G % n == 0):
            held = 4 * (heads * bq + 2 * bk) * width * itemsize + 8 * bk * width + 20 * bq * bk
            if held <= VMEM:
                return Blocks(bq, bk, heads)
    return Blocks(bq, bk, 1)


def _divisor(length: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides `length`; `length` itself below 128."""
    if length < LANES:
        return length
    if length % LANES:
        raise ConfigError(
            f"batch.tokens_per_row: {length} places of a row on a device; attention on TPU takes a multiple of {LANES} "
            f"({-(-length // LANES) * LANES} is the next) or fewer than {LANES}"
        )
    return next(n for n in range(most, 0, -LANES) if length % n == 0)


def block_kinds(query_places: Array, key_places: Array, first_query: Array, options: Options) -> Array:
    """int32[B, T/queries, S/keys]: SKIPPED, MASKING or WHOLE, from the least and greatest id and position of blocks."""
    blocks, window = options.blocks, options.window
    low, high = _bounds(query_places, blocks.queries, 2)
    key_low, key_high = _bounds(key_places, blocks.keys, 1)
    root, root_high, key_root = _shared(low[0]), _shared(high[0]), _shared(key_high[0])
    seen = (key_low[0] <= high[0]) & (low[0] <= key_high[0])
    seen |= (key_low[0] <= root_high) & (jnp.maximum(key_low[0], root) <= key_root)  # a shared prompt among the keys
    same = (key_low[0] == low[0]) & (key_low[0] == high[0])
    shared = (key_low[0] == root) & (key_low[0] == root_high)
    whole = (key_low[0] == key_high[0]) & (same | shared)
    first = first_query[0] + jnp.arange(low.shape[2], dtype=jnp.int32)[None, :, None] * blocks.queries
    first_key = jnp.arange(key_low.shape[3], dtype=jnp.int32)[None, None, :] * blocks.keys
    seen &= first_key < first + blocks.queries
    whole &= first_key + blocks.keys <= first + 1
    if window is not None:
        seen &= low[1] - key_high[1] < window
        whole &= high[1] - key_low[1] < window
    return jnp.where(seen, jnp.where(whole, WHOLE, MASKING), SKIPPED).astype(jnp.int32)


def _bounds(places, block, axis):
    """Least and greatest of each block of places [B, R, T]: [R, B, T/block], with one more axis of 1 at axis + 1."""
    B, R, T = places.shape
    split = places.reshape(B, R, T // block, block)
    return tuple(jnp.expand_dims(x.swapaxes(0, 1), axis + 1) for x in (split.min(3), split.max(3)))


def _shared(ids):
    """The ids of the segments' shared prompts."""
    return ids & -BRANCHES


def _walk(kinds):
    """int32[all]: for each step over the last axis of `kinds`, 4 * the block to hold + the step's kind.

    The block to hold at a skipped step is that of the step before, and before the first the first: nothing is copied.
    """
    at = jnp.arange(kinds.shape[2], dtype=jnp.int32)[None, None, :]
    latest = jax.lax.cummax(jnp.where(kinds > SKIPPED, at, -1), axis=2)
    first = jnp.argmax(kinds > SKIPPED, axis=2, keepdims=True).astype(jnp.int32)
    return (4 * jnp.maximum(latest, first) + kinds).reshape(-1)


def _read(word):
    """The block to hold and the kind of a step of a walk."""
    return word >> 2, word & 3


def _sights(queries, keys, first_query, options):
    """Sights of two Places."""

    def packed(places):
        ids = jnp.where(places.segments == 0, EMPTY, places.segments) * BRANCHES
        if queries.branches is not None:
            ids += places.branches
        return jnp.stack([ids] if options.window is None else [ids, places.positions], axis=1)

    query_places, key_places = packed(queries), packed(keys)
    first_query = jnp.asarray(first_query, jnp.int32).reshape(1)
    kinds = block_kinds(query_places, key_places, first_query, options)
    return Sights(query_places, key_places, first_query, _walk(kinds), _walk(kinds.swapaxes(1, 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options, q, k, v, sights):
    """[B, K, G, T, h] of q like it and k, v [B, K, S, h]."""
    return _forward(options, q, k, v, sights)[0]


def _flash_forward(options, q, k, v, sights):
    out, lse = _forward(options, q, k, v, sights)
    return out, (q, k, v, out, lse, sights)


def _flash_backward(options, kept, d_out):
    q, k, v, out, lse, sights = kept
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, :, None]
    operands = (q, d_out, lse, delta, k, v)
    dq = _query_gradient(options, *operands, sights)
    dk, dv = _key_gradients(options, *operands, sights)
    return dq, dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)


# ---- the kernels. Each runs over a grid whose inner steps walk the blocks to sum over; sums wait in VMEM.


def _forward(options, q, k, v, sights):
    """Output like q, and log2 of the sum of exp2 of the scores, f32[B, K, G, 1, T]."""
    blocks, h = options.blocks, q.shape[4]
    sums = [
        pltpu.VMEM((blocks.heads, 1, blocks.queries), jnp.float32),
        pltpu.VMEM((blocks.heads, 1, blocks.queries), jnp.float32),
        pltpu.VMEM((blocks.heads, h, blocks.queries), jnp.float32),
    ]
    lse = jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[3]), jnp.float32)
    inputs, outputs = ["query", "key", "key"], ["query", "one"]
    return _call(_forward_kernel, "flash_forward", options, sights, inputs, (q, k, v), outputs, (q, lse), sums, 2)


def _forward_kernel(options, step, q_ref, k_ref, v_ref, mask, out_ref, lse_ref, m_ref, l_ref, sum_ref):
    @pl.when(step.first)
    def _():
        m_ref[...] = jnp.full_like(m_ref, LOWEST)
        l_ref[...] = jnp.zeros_like(l_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def attend(seen):
        k, v = k_ref[...], v_ref[...]
        for n in range(options.blocks.heads):
            scores, _ = _scores(options, k, q_ref[n], seen)
            m_before = m_ref[n]
            m = jnp.maximum(m_before, scores.max(axis=0, keepdims=True))
            probs = jnp.exp2(scores - m)
            shrink = jnp.exp2(m_before - m)
            m_ref[n] = m
            l_ref[n] = l_ref[n] * shrink + probs.sum(axis=0, keepdims=True)
            sum_ref[n] = sum_ref[n] * shrink + _dot(v, probs.astype(v.dtype), _OVER_KEYS)

    _by_kind(step, mask, attend)

    @pl.when(step.last)
    def _():
        for n in range(options.blocks.heads):
            l = jnp.where(l_ref[n] == 0, 1.0, l_ref[n])
            out_ref[n] = (sum_ref[n] / l).T.astype(out_ref.dtype)
            lse_ref[n] = m_ref[n] + jnp.log(l) * LOG2E


def _query_gradient(options, q, d_out, lse, delta, k, v, sights):
    """dq, like q."""
    sums = [pltpu.VMEM((options.blocks.heads, q.shape[4], options.blocks.queries), jnp.float32)]
    inputs, operands = ["query", "query", "one", "one", "key", "key"], (q, d_out, lse, delta, k, v)
    return _call(_dq_kernel, "flash_dq", options, sights, inputs, operands, ["query"], (q,), sums, 3)[0]


def _dq_kernel(options, step, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, mask, dq_ref, sum_ref):
    @pl.when(step.first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def attend(seen):
        k, v = k_ref[...], v_ref[...]
        for n in range(options.blocks.heads):
            _, d_scores = _score_gradient(options, k, v, q_ref[n], do_ref[n], lse_ref[n], delta_ref[n], seen)
            sum_ref[n] += _dot(k, d_scores.astype(k.dtype), _OVER_KEYS)

    _by_kind(step, mask, attend)

    @pl.when(step.last)
    def _():
        for n in range(options.blocks.heads):
            dq_ref[n] = (sum_ref[n] * options.scale).T.astype(dq_ref.dtype)


def _key_gradients(options, q, d_out, lse, delta, k, v, sights):
    """dk, dv, like k: summed over the heads of a group within the kernel."""
    sums = [pltpu.VMEM((options.blocks.keys, k.shape[3]), jnp.float32)] * 2
    inputs, operands = ["query", "query", "one", "one", "key", "key"], (q, d_out, lse, delta, k, v)
    outputs = ["key", "key"]
    return _call(_dkv_kernel, "flash_dkv", options, sights, inputs, operands, outputs, (k, v), sums, 4, by_keys=True)


def _dkv_kernel(options, step, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, mask, dk_ref, dv_ref, *sums):
    dk_sum_ref, dv_sum_ref = sums

    @pl.when(step.first)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def attend(seen):
        k, v = k_ref[...], v_ref[...]
        for n in range(options.blocks.heads):
            q, d_out = q_ref[n], do_ref[n]
            probs, d_scores = _score_gradient(options, k, v, q, d_out, lse_ref[n], delta_ref[n], seen)
            dv_sum_ref[...] += _dot(probs.astype(d_out.dtype), d_out, _OVER_QUERIES)
            dk_sum_ref[...] += _dot(d_scores.astype(q.dtype), q, _OVER_QUERIES)

    _by_kind(step, mask, attend)

    @pl.when(step.last)
    def _():
        dk_ref[...] = (dk_sum_ref[...] * options.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def _scores(options, k, q, seen):
    """Scores [keys, queries] in base 2, MASKED where not seen, and their slope under a soft cap."""
    scores, slope = _dot(k, q, _KEYS_BY_QUERIES), None
    if options.soft_cap is None:
        scores *= options.scale * LOG2E
    else:
        bent = jnp.tanh(scores * (options.scale / options.soft_cap))
        scores, slope = bent * (options.soft_cap * LOG2E), 1 - bent * bent
    return scores if seen is None else jnp.where(seen, scores, MASKED), slope


def _score_gradient(options, k, v, q, d_out, lse, delta, seen):
    """Probabilities and the gradient of the scaled scores, both f32[keys, queries]."""
    scores, slope = _scores(options, k, q, seen)
    probs = jnp.exp2(scores - lse)
    d_scores = probs * (_dot(v, d_out, _KEYS_BY_QUERIES) - delta)
    return probs, d_scores if slope is None else d_scores * slope


def _dot(a, b, dimensions):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _by_kind(step, mask, attend):
    """`attend(mask())` where the pair of blocks has something to see; `attend(None)` where everything is seen."""
    pl.when(step.kind == MASKING)(lambda: attend(mask()))
    pl.when(step.kind == WHOLE)(lambda: attend(None))


def _mask(options, offset, query_places, key_places):
    """bool[keys, queries]; offset: row index of the first query less that of the first key."""
    shape = (options.blocks.keys, options.blocks.queries)
    ids, key = query_places[:1], key_places.T
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    seen = (rows - columns <= offset) & ((key[:, :1] == ids) | (key[:, :1] == _shared(ids)))
    if options.window is not None:
        seen &= query_places[1:] - key[:, 1:] < options.window
    return seen


# ---- how they are called


@dataclasses.dataclass(frozen=True)
class _Step:
    """Where in the walk a step of a kernel stands: bool[] twice, and the kind of its pair of blocks."""

    first: Array
    last: Array
    kind: Array


def _call(kernel, name, options, sights, inputs, operands, outputs, results, sums, products, by_keys=False):
    """One kernel over all rows, key heads and blocks.

    inputs, outputs: what the blocks of operands and results are of: "query" [B, K, G, T, h], "one" number a query and
    head [B, K, G, 1, T], "key" [B, K, S, h]. The places of queries and keys come after the operands.
    products: matrix products a pair of blocks, for the estimate of cost (of the causal half of all pairs).
    by_keys: the grid is (row, key head, key block; heads, query block) in place of
      (row, key head, heads, query block; key block): what follows the semicolon is summed over.
    """
    blocks, (B, K, G, T, h), S = options.blocks, operands[0].shape, operands[inputs.index("key")].shape[2]
    Ti, Sj, parts = T // blocks.queries, S // blocks.keys, G // blocks.heads
    grid = (B, K, Sj, parts, Ti) if by_keys else (B, K, parts, Ti, Sj)

    def walk_at(b, outer, inner):
        return (b * (Sj if by_keys else Ti) + outer) * grid[4] + inner

    def at(b, head, x, y, z, first_query, walk):
        """(row, key head, part of the group, query block, key block) to hold at a step of the grid."""
        held, _ = _read(walk[walk_at(b, x if by_keys else y, z)])
        return (b, head, y, held, x) if by_keys else (b, head, x, y, held)

    def run(first_ref, walk_ref, *refs):
        place = [pl.program_id(n) for n in range(5)]  # here: within `pl.when` interpret mode knows none
        b, _, x, y, z = place
        held, kind = _read(walk_ref[walk_at(b, x if by_keys else y, z)])
        i, j = (held, x) if by_keys else (y, held)
        first, last = z == 0, z == grid[4] - 1
        if by_keys:
            first, last = first & (y == 0), last & (y == parts - 1)
        count = len(operands)
        queries_ref, keys_ref = refs[count : count + 2]

        def mask():
            offset = first_ref[0] + i * blocks.queries - j * blocks.keys
            return _mask(options, offset, queries_ref[...], keys_ref[...])

        kernel(options, _Step(first, last, kind), *refs[:count], mask, *refs[count + 2 :])

    specs = _specs(blocks, h, sights.query_places.shape[1], at)
    size = sum(x.size * x.dtype.itemsize for x in (*operands, *results))
    pairs = B * K * G * T * S // 2
    cost = pl.CostEstimate(
        flops=2 * products * pairs * h,
        bytes_accessed=size,
        transcendentals=pairs * (1 if options.soft_cap is None else 2),
    )
    return pl.pallas_call(
        run,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[specs[x] for x in (*inputs, "query_places", "key_places")],
            out_specs=[specs[x] for x in outputs],
            scratch_shapes=sums,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (3 if by_keys else 4) + ("arbitrary",) * (2 if by_keys else 1)
        ),
        cost_estimate=cost,
        interpret=options.interpret,
    )(
        sights.first_query,
        sights.by_keys if by_keys else sights.by_queries,
        *operands,
        sights.query_places,
        sights.key_places,
    )


def _specs(blocks, h, R, at):
    """{what an array is of: its block}, `at` a step of the grid."""

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda *step: index(*at(*step)))

    bq, bk, heads = blocks.queries, blocks.keys, blocks.heads
    return {
        "query": spec((None, None, heads, bq, h), lambda b, head, part, i, j: (b, head, part, i, 0)),
        "one": spec((None, None, heads, 1, bq), lambda b, head, part, i, j: (b, head, part, 0, i)),
        "key": spec((None, None, bk, h), lambda b, head, part, i, j: (b, head, j, 0)),
        "query_places": spec((None, R, bq), lambda b, head, part, i, j: (b, 0, i)),
        "key_places": spec((None, R, bk), lambda b, head, part, i, j: (b, 0, j)),
    }
