"""The decoder of every family: Flax Linen modules, layers stacked [L, ...] and scanned by pattern period."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpost.models.config import Layer, ModelConfig
from jaxpost.ops.attention import Places, attention
from jaxpost.ops.rope import apply_rope, rope_tables
from jaxpost.sharding.rules import constrain
from jaxpost.types import Array, record

REMAT = {  # what the backward pass may keep instead of computing it again; None: everything
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@record
class Cache:
    """Keys and values of the tokens so far; token n of a row lies in slot n, padding included."""

    k: Array  # [L, B, S, K, h]
    v: Array  # [L, B, S, K, h]
    positions: Array  # int32[B, S], -1 where empty or padding
    length: Array  # int32[], slots in use


class Linear(nn.Module):
    """A weight and the product with it: the one owner of axes and types.

    Sums over the last `inputs` dimensions of x and the first of the weight. The product is made on flattened
    matrices: left to an einsum over [B, T, ...], XLA on CPU transposes whole activations for the weight's gradient
    (an MLP of D 256, F 1024 at 1,024 tokens then takes 2.4 times as long, forward and backward).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    inputs: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ins, outs = range(self.inputs), range(self.inputs, len(self.shape))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", ins, outs)
        weight = self.param("weight", nn.with_logical_partitioning(init, self.axes), self.shape, jnp.float32)
        width = math.prod(self.shape[: self.inputs])
        y = x.reshape(-1, width) @ weight.astype(self.dtype).reshape(width, -1)
        return y.reshape(*x.shape[: x.ndim - self.inputs], *self.shape[self.inputs :])


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in f32 (arXiv:1910.07467)."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32)[None, None]).astype(self.dtype)


class Attention(nn.Module):
    config: ModelConfig
    kind: Layer
    dtype: str

    @nn.compact
    def __call__(self, x, tables, queries, keys, first_query, store):
        c = self.config
        D, H, K, h = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        key_axes = ("embed", "kv_heads", "head_dim")
        q = Linear((D, H, h), ("embed", "heads", "head_dim"), self.dtype, name="q")(x)
        k = Linear((D, K, h), key_axes, self.dtype, name="k")(x)
        v = Linear((D, K, h), key_axes, self.dtype, name="v")(x)
        q, k = apply_rope(q, tables), apply_rope(k, tables)
        q = constrain(q, ("batch", "length", "heads", "head_dim"))
        k, v = (constrain(z, ("batch", "length", "kv_heads", "head_dim")) for z in (k, v))
        k, v, stored = store(k, v)
        out = attention(
            q, k, v, queries, keys, scale=c.attention_scale, first_query=first_query, window=self.kind.window
        )
        return Linear((H, h, D), ("heads", "head_dim", "embed"), self.dtype, inputs=2, name="o")(out), stored


class MLP(nn.Module):
    """down(silu(gate x) * up x) (SwiGLU, arXiv:2002.05202)."""

    config: ModelConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        D, F = self.config.embed_dim, self.config.mlp_dim
        gate = Linear((D, F), ("embed", "mlp"), self.dtype, name="gate")(x)
        up = Linear((D, F), ("embed", "mlp"), self.dtype, name="up")(x)
        x = constrain(jax.nn.silu(gate) * up, ("batch", "length", "mlp"))
        return Linear((F, D), ("mlp", "embed"), self.dtype, name="down")(x)


class Block(nn.Module):
    """One layer, x [B, T, D] -> (x, stored).

    tables: cos and sin of the layer's RoPE. queries, keys, first_query: as ops.attention has them.
    store: k, v of the T tokens -> k, v to attend to, stored (the KV cache; None in training).
    """

    config: ModelConfig
    kind: Layer
    dtype: str

    @nn.compact
    def __call__(self, x, tables, queries, keys, first_query, store):
        norm = functools.partial(RMSNorm, self.config.norm_eps, self.dtype)
        attend = Attention(self.config, self.kind, self.dtype, name="attn")
        out, stored = attend(norm(name="attn_norm")(x), tables, queries, keys, first_query, store)
        x = constrain(x + out, ("batch", "length", "hidden"))
        x = x + MLP(self.config, self.dtype, name="mlp")(norm(name="mlp_norm")(x))
        return constrain(x, ("batch", "length", "hidden")), stored


class Decoder(nn.Module):
    """tokens -> hidden states after the final norm.

    Parameters: embed.weight [V, D], layers.* [n, ...] (whole pattern periods), tail.* [L - n, ...] where the pattern
    leaves some over, final_norm.scale [D], and head.weight [V, D] unless tied.
    """

    config: ModelConfig
    dtype: str
    remat: str  # a key of REMAT
    unroll: bool  # straight code instead of a loop: 10 % quicker on CPU, slow to compile for deep models

    @nn.compact
    def __call__(self, tokens: Array, places: Places, cache: Cache | None = None) -> tuple[Array, Cache | None]:
        """hidden [B, T, D]; with a cache, the tokens continue it and the longer cache is returned."""
        c = self.config
        table = self._table("embed")
        if not c.tied:
            self._table("head")
        x = jnp.take(table, tokens, axis=0).astype(self.dtype)
        x = constrain(x, ("batch", "length", "hidden"))
        keys, first_query, kv = places, 0, None
        if cache is not None:
            first_query, kv = cache.length, (cache.k, cache.v)
            positions = jax.lax.dynamic_update_slice(cache.positions, places.positions, (0, cache.length))
            keys = Places((positions >= 0).astype(jnp.int32), None, positions)
            cache = Cache(cache.k, cache.v, positions, cache.length + tokens.shape[1])
        ropes = {kind.rope for kind in c.pattern}
        tables = {rope: rope_tables(rope, c.head_dim, places.positions) for rope in ropes}
        run = functools.partial(self._layers, tables=tables, queries=places, keys=keys, first_query=first_query)
        x, kv = run("layers", c.pattern, 0, c.num_layers - c.tail_layers, x, kv)
        if c.tail_layers:
            x, kv = run("tail", c.pattern[: c.tail_layers], c.num_layers - c.tail_layers, c.tail_layers, x, kv)
        x = RMSNorm(c.norm_eps, self.dtype, name="final_norm")(x)
        if cache is not None:
            cache = Cache(*kv, cache.positions, cache.length)
        return x, cache

    def _table(self, name):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        return _Table(init, (self.config.vocab_size, self.config.embed_dim), name=name)()

    def _layers(self, name, kinds, first, count, x, kv, *, tables, queries, keys, first_query):
        """`count` stacked layers from layer `first` on, one loop step per period of `kinds`."""
        P = len(kinds)
        blocks = [Block(self.config, kind, self.dtype, parent=None) for kind in kinds]

        def init(key):
            def one(key):
                return blocks[0].init(key, x, tables[kinds[0].rope], queries, queries, 0, lambda k, v: (k, v, None))

            stacked = jax.vmap(one)(jax.random.split(key, count))["params"]
            return jax.tree.map(_add_layers_axis, stacked, is_leaf=_is_box)

        stacked = self.param(name, init)
        if self.is_initializing():
            return x, kv

        def apply(block, rope, x, params, kv, layer):
            store = functools.partial(_store, kv, layer, first_query)
            return block.apply({"params": params}, x, tables[rope], queries, keys, first_query, store)

        def period(carry, xs):
            x, kv = carry
            params, index = xs
            leaves, tree = jax.tree.flatten(params)
            layers = zip(*(jnp.split(leaf, P) for leaf in leaves), strict=True)  # its gradient is one concatenation
            for i, (block, kind, own) in enumerate(zip(blocks, kinds, layers, strict=True)):
                step = self._remat(functools.partial(apply, block, kind.rope))
                x, kv = step(x, tree.unflatten(leaf[0] for leaf in own), kv, first + index * P + i)
            return (x, kv), None

        periods = jax.tree.map(lambda p: p.reshape(count // P, P, *p.shape[1:]), stacked)
        indices = jnp.arange(count // P, dtype=jnp.int32)
        (x, kv), _ = jax.lax.scan(period, (x, kv), (periods, indices), unroll=self.unroll or 1)
        return x, kv

    def _remat(self, function):
        if REMAT[self.remat] is None:
            return function
        # The barrier against merging both computations costs time and is only needed in straight code (jax.checkpoint).
        return jax.checkpoint(function, policy=REMAT[self.remat], prevent_cse=self.unroll)


class _Table(nn.Module):
    init_fn: Any
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        return self.param("weight", self.init_fn, self.shape, jnp.float32)


def _store(kv, layer, slot, k, v):
    """Writes k and v [B, T, K, h] into the cache's layer from `slot` on; returns all keys and values to attend to."""
    if kv is None:
        return k, v, None
    at = (layer, 0, slot, 0, 0)
    kv = tuple(jax.lax.dynamic_update_slice(old, new[None], at) for old, new in zip(kv, (k, v), strict=True))
    return *(jax.lax.dynamic_index_in_dim(z, layer, keepdims=False) for z in kv), kv


def _is_box(x):
    return isinstance(x, nn.LogicallyPartitioned)


def _add_layers_axis(box):
    return box.replace(names=("layers", *box.names))
