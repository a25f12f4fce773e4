"""The parts of a model that say themselves what each device computes and sends, under the mesh of `jax.set_mesh`.

Left to the partitioner, a table is gathered whole, a weight's gradient is summed on every device before it is cut, and
a kernel is not split at all. Without a mesh, or on one device, these are the plain functions.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpost.models.cache import AXES as CACHE
from jaxpost.models.cache import KV, key_positions, plain
from jaxpost.ops import vocab
from jaxpost.ops.attention import Places, attention, cached_attention
from jaxpost.ops.decode import decode_attention
from jaxpost.ops.flash import flash_attention
from jaxpost.ops.logprobs import Head, TokenStats, row_logps
from jaxpost.sharding.rules import constrain, partition_spec
from jaxpost.types import Array, Rows

HIDDEN = ("batch", "length", "hidden")
TABLE = ("vocab", "embed")
MOST_QUERIES = 256  # of a key head and row that the kernel of decoding takes: more (prompts) are left to the compiler


def _sizes() -> dict[str, int]:
    """Sizes of the mesh's axes; none where there is one device, or no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or mesh.size == 1 else dict(mesh.shape)


def _mapped(fn, in_axes, out_specs):
    """`fn` of each device's shards. in_axes: (logical axes, array) of each argument."""
    specs = tuple(partition_spec(axes, x.shape, _sizes()) for axes, x in in_axes)
    # Unchecked: a Pallas kernel says nothing of what varies over the mesh.
    return jax.shard_map(fn, in_specs=specs, out_specs=out_specs, check_vma=False)(*(x for _, x in in_axes))


def _over(axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes, of more than one device, that a dimension with this logical axis is split over."""
    (entry,) = partition_spec((axis,), (size,), _sizes())
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    return tuple(name for name in names if _sizes().get(name, 1) > 1)


def _only(axis: str, size: int) -> str | None:
    """The same of a logical axis that lies on one mesh axis at most."""
    return next(iter(_over(axis, size)), None)


# ---- weights ----


def gathered(weight: Array, axes: tuple[str, ...]) -> Array:
    """A weight as a product needs it, whole along "embed"; its gradient is reduced into the shards it came from.

    Without the second half a constraint's gradient has the constraint's layout: summed whole on every device.
    """
    if not _sizes():
        return weight
    return _gathered(axes, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(axes, weight):
    weight = constrain(weight, axes)  # else one that waits on the host is gathered there, by calls of the host
    return constrain(weight, tuple(None if axis == "embed" else axis for axis in axes))


_gathered.defvjp(lambda axes, weight: (_gathered(axes, weight), None), lambda axes, _, g: (constrain(g, axes),))


# ---- embedding ----


def lookup(table: Array, tokens: Array) -> Array:
    """table[tokens], [B, T, D], of a table [V, D] that is split along V (tensor) and D (fsdp, context).

    Every device looks up its columns for the tokens of all, and columns are exchanged for tokens: the table is never
    gathered, and of its gradient each device sums its own columns, in f32.
    """
    if not _sizes():
        return jnp.take(table, tokens, axis=0)
    return _lookup(table, tokens)


@jax.custom_vjp
def _lookup(table, tokens):
    words, dim = _table_axes(table)

    def local(table, tokens):
        index, there = _own_rows(table, tokens, words, dim)
        found = jnp.where(there[:, None], jnp.take(table, index, axis=0), 0)
        if dim:
            found = jax.lax.all_to_all(found, dim, split_axis=0, concat_axis=1, tiled=True)
        found = jax.lax.psum(found, words) if words else found
        return found.reshape(*tokens.shape, -1)

    in_axes = (TABLE, table), (("batch", "length"), tokens)
    return _mapped(local, in_axes, _hidden_spec(tokens, table.shape[1]))


def _lookup_forward(table, tokens):
    return _lookup(table, tokens), (table, tokens)


def _lookup_backward(residuals, g):
    table, tokens = residuals
    words, dim = _table_axes(table)
    over = _positions_axes(tokens, but=dim)

    def local(table, tokens, g):
        index, there = _own_rows(table, tokens, words, dim)
        g = g.reshape(-1, g.shape[-1])
        if dim:
            g = jax.lax.all_to_all(g, dim, split_axis=1, concat_axis=0, tiled=True)
        g = jnp.where(there[:, None], g, 0).astype(jnp.float32)
        total = jnp.zeros(table.shape, jnp.float32).at[index].add(g)
        return jax.lax.psum(total, over).astype(table.dtype)

    in_axes = (TABLE, table), (("batch", "length"), tokens), (HIDDEN, g)
    return _mapped(local, in_axes, partition_spec(TABLE, table.shape, _sizes())), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _own_rows(table, tokens, words, dim):
    """(rows of this device's shard [v, d], whether they are there), [N] of the tokens of all devices along `dim`."""
    tokens = tokens.reshape(-1)
    if dim:
        tokens = jax.lax.all_gather(tokens, dim, axis=0, tiled=True)
    index = tokens - (jax.lax.axis_index(words) * len(table) if words else 0)
    there = (index >= 0) & (index < len(table))
    return jnp.where(there, index, 0), there


def _table_axes(table) -> tuple[str | None, tuple[str, ...]]:
    """The mesh axes that a table [V, D] is split over."""
    return _only("vocab", table.shape[0]), _over("embed", table.shape[1])


def _positions_axes(tokens, but=()) -> tuple[str, ...]:
    """The mesh axes that hold different positions of [B, T], without `but`."""
    names = [name for axis, size in zip(("batch", "length"), tokens.shape, strict=True) for name in _over(axis, size)]
    return tuple(name for name in names if name not in but)


def _hidden_spec(tokens, dim) -> PartitionSpec:
    return partition_spec(HIDDEN, (*tokens.shape, dim), _sizes())


# ---- head ----


def row_stats(hidden: Array, head: Head, rows: Rows, *, chunk: int, temperature: float = 1.0) -> TokenStats:
    """`ops.logprobs.row_logps`; over a mesh without ever gathering the head (ops/vocab.py).

    chunk: positions, over the rows of all devices, whose logits are held at once.
    """
    sizes = _sizes()
    if not sizes or head.bias is not None:
        return row_logps(hidden, head, rows, temperature=temperature, chunk=chunk)
    later = lambda x: jnp.roll(x, -1, axis=1)  # noqa: E731
    scored = later(rows.weights != 0).at[:, -1].set(False)
    words, dim = _table_axes(head.weight)
    split = math.prod(sizes[name] for name in _positions_axes(rows.tokens))
    local = rows.tokens.size // split
    static = vocab.Vocab(
        head.weight.shape[0],
        float(temperature),
        head.scale,
        head.soft_cap,
        max(1, min(chunk // split, local)),
        dim,
        words,
        _positions_axes(rows.tokens, but=dim),
    )
    stats = TokenStats(*_row_stats(static, hidden, head.weight, later(rows.tokens), scored))
    constant = ("mean_logit", "log_sum_sq_probs", "is_top1")
    stats = dataclasses.replace(stats, **{name: jax.lax.stop_gradient(getattr(stats, name)) for name in constant})
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_stats(static, hidden, weight, targets, scored):
    return _row_stats_forward(static, hidden, weight, targets, scored)[0]


def _row_stats_forward(static, hidden, weight, targets, scored):
    places = partition_spec(("batch", "length"), targets.shape, _sizes())
    in_axes = (HIDDEN, hidden), (TABLE, weight), (("batch", "length"), targets), (("batch", "length"), scored)
    out_specs = ((places,) * 5, places)
    stats, log_normaliser = _mapped(functools.partial(vocab.forward, static), in_axes, out_specs)
    return stats, (hidden, weight, targets, scored, log_normaliser, stats[1])


def _row_stats_backward(static, residuals, cotangents):
    hidden, weight, *per_position = residuals
    in_axes = (HIDDEN, hidden), (TABLE, weight)
    in_axes += tuple((("batch", "length"), x) for x in (*per_position, *cotangents[:2]))
    out_specs = tuple(partition_spec(axes, x.shape, _sizes()) for axes, x in in_axes[:2])
    return *_mapped(functools.partial(vocab.backward, static), in_axes, out_specs), None, None


_row_stats.defvjp(_row_stats_forward, _row_stats_backward)


# ---- attention ----


def attend(q: Array, k: Array, v: Array, places: Places, *, kernels: str, **limits) -> Array:
    """`ops.attention.attention` [B, T, H, h] of the tokens of rows to each other.

    kernels: "xla", "pallas", or "interpret" (the kernels of "pallas", without a TPU). limits: scale, window, soft_cap.
    Where tokens are split (context), every device gathers the keys and values of its rows.
    """
    sizes = _sizes()
    attention_fn = functools.partial(KERNELS[kernels], **limits)
    if not sizes or (kernels == "xla" and sizes["context"] == 1):
        return attention_fn(q, k, v, places, places)
    q_axes, kv_axes = ("batch", "length", "heads", "head_dim"), ("batch", "length", "kv_heads", "head_dim")
    context = _only("length", q.shape[1])
    group = q.shape[2] // k.shape[2]

    def local(q, k, v, queries, keys):
        first_query = 0
        if context:
            k, v = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (k, v))
            first_query = jax.lax.axis_index(context) * q.shape[1]
        if q.shape[2] != k.shape[2] * group:  # fewer key heads than shards of the query heads
            k, v = (_own_heads(x, q.shape[2], group) for x in (k, v))
        return attention_fn(q, k, v, queries, keys, first_query=first_query)

    in_axes = (q_axes, q), (kv_axes, k), (kv_axes, v)
    specs = [partition_spec(axes, x.shape, sizes) for axes, x in in_axes]
    rows = [partition_spec((axis, other), q.shape[:2], sizes) for axis, other in (("batch", "length"), ("batch", None))]
    mapped = jax.shard_map(local, in_specs=(*specs, *rows), out_specs=specs[0], check_vma=False)
    return mapped(q, k, v, places, places)


def attend_cached(q: Array, kv: KV, layer, positions: Array, lengths: Array, *, kernels: str, **limits) -> Array:
    """`ops.attention.cached_attention` [B, T, H, h] of new tokens to a cache that holds them too.

    layer: of a stacked KV. positions: int32[B, T]. lengths: int32[B], the new tokens included. The rest: as `attend`.
    """
    sizes, (K, S, h) = _sizes(), kv.k.shape[-3:]
    split = [math.prod(sizes[name] for name in _over(axis, n)) for axis, n in (("heads", q.shape[2]), ("kv_heads", K))]
    # The kernel holds all queries of a key head at once; for other sizes the compiler would copy the cache.
    fits = q.shape[1] * q.shape[2] // K <= MOST_QUERIES and h % 128 == 0 and S % 8 == 0
    if kernels == "xla" or not fits or len(set(split)) > 1:
        k, v = plain(kv, layer, q.dtype)
        return cached_attention(q, k, v, positions, key_positions(lengths, S), **limits)
    stack = () if layer is None else ("layers",)
    decode = functools.partial(decode_attention, **limits, interpret=kernels == "interpret")

    def local(q, kv, layer, positions, lengths):
        return decode(q, kv.k, kv.v, positions, lengths, scales=kv.scales, layer=layer)

    if not sizes:
        return local(q, kv, layer, positions, lengths)
    place = lambda axes, x: partition_spec(axes, x.shape, sizes)  # noqa: E731
    q_spec = place(("batch", None, "heads", "head_dim"), q)
    kv_spec = jax.tree.map(lambda x: place((*stack, *CACHE[: x.ndim - len(stack)]), x), kv)
    specs = q_spec, kv_spec, PartitionSpec(), place(("batch", None), positions), place(("batch",), lengths)
    return jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)(q, kv, layer, positions, lengths)


def _own_heads(x, heads: int, group: int):
    """Of all key heads [B, T, K, h] those that this device's `heads` query heads read."""
    if heads % group and group % heads:  # they begin or end inside a group: one key head for each query head
        index = (jax.lax.axis_index("tensor") * heads + jnp.arange(heads)) // group
        return jnp.take(x, index, axis=2)
    first = jax.lax.axis_index("tensor") * heads // group
    return jax.lax.dynamic_slice_in_dim(x, first, max(1, heads // group), axis=2)


KERNELS = {
    "xla": attention,
    "pallas": flash_attention,
    "interpret": functools.partial(flash_attention, interpret=True),
}
