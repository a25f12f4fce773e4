"""The decoder of every family: Flax Linen modules, layers stacked [L, ...] and scanned by pattern period."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from jaxpost.models.cache import Cache, extend
from jaxpost.models.config import Layer, ModelConfig, stack_row
from jaxpost.models.lora import PREFIX, Lora, column_norms, delta
from jaxpost.models.quantize import weight_of
from jaxpost.models.sharded import attend, attend_cached, gathered, lookup
from jaxpost.ops.attention import Places
from jaxpost.ops.experts import expert_mlp, route
from jaxpost.ops.rope import apply_rope, rope_tables
from jaxpost.sharding.memory import KIND, on_device, waits
from jaxpost.sharding.rules import RULES, constrain, partition_spec
from jaxpost.types import Array

INPUT = "layer_input"  # what `full` keeps of a layer, by the name that `offload` knows it by
STACKS = ("layers", "tail")
REMAT = {  # what the backward pass may keep instead of computing it again; None: everything
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT], offload_src="device", offload_dst=KIND
    ),
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
EXPERT_AXES = {name: ("experts", "embed", "mlp") for name in ("gate", "up")} | {"down": ("experts", "mlp", "embed")}
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class Linear(nn.Module):
    """A weight and the product with it: the one owner of axes and types.

    Sums over the last `inputs` dimensions of x and the first of the weight, and adds a bias if asked to. The product is
    made on flattened matrices: left to an einsum over [B, T, ...], XLA on CPU transposes whole activations for the
    weight's gradient (an MLP of D 256, F 1024 at 1,024 tokens then takes 2.4 times as long, forward and backward).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    inputs: int = 1
    biased: bool = False
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = math.prod(self.shape[: self.inputs])
        weight = gathered(self._weight(), self.axes).reshape(width, -1)
        flat = x.reshape(-1, width)
        y = flat @ weight
        if self.lora is not None:
            y = self._adapted(flat, y, weight)
        if self.biased:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.inputs :])
            bias = self.param("bias", init, self.shape[self.inputs :], jnp.float32)
            y = y + bias.astype(self.dtype).reshape(1, -1)
        return y.reshape(*x.shape[: x.ndim - self.inputs], *self.shape[self.inputs :])

    def _weight(self):
        """The weight in `dtype`, whatever it is held in."""
        if not self.is_initializing():
            return weight_of(self.variables["params"], self.dtype)
        ins, outs = range(self.inputs), range(self.inputs, len(self.shape))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", ins, outs)
        return self.param("weight", nn.with_logical_partitioning(init, self.axes), self.shape, jnp.float32)

    def _adapted(self, x, y, weight):
        """y = x weight [N, outs] with the adapter worked in (models/lora)."""
        lora, ins, outs = self.lora, self.shape[: self.inputs], self.shape[self.inputs :]
        width = math.prod(ins)
        a = self._lora_param("a", (*ins, lora.rank), (*self.axes[: self.inputs], "rank"))
        b = self._lora_param("b", (lora.rank, *outs), ("rank", *self.axes[self.inputs :]))
        a, b = a.reshape(width, -1), b.reshape(lora.rank, -1)
        kept = x
        if lora.dropout and self.has_rng("dropout"):
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - lora.dropout, x.shape)
            kept = jnp.where(keep, x / (1 - lora.dropout), 0).astype(x.dtype)
        y = y + (kept @ a.astype(self.dtype)) @ b.astype(self.dtype) * jnp.asarray(lora.scale, self.dtype)
        if lora.dora:
            magnitude = self._lora_param("magnitude", outs, self.axes[self.inputs :])
            norms = column_norms(weight.astype(jnp.float32) + delta(a, b, lora.scale, 1), 1)
            y = y * (magnitude.reshape(-1) / jax.lax.stop_gradient(norms)).astype(self.dtype)[None]  # section 4.3
        return y

    def _lora_param(self, name, shape, axes):
        """Of which `lora.fresh` draws the first values."""
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return self.param(PREFIX + name, init, shape, jnp.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, in f32 (arXiv:1910.07467); with `unit_offset` times 1 + scale."""

    eps: float
    unit_offset: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", nn.with_logical_partitioning(init, ("norm",)), x.shape[-1:], jnp.float32)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) + float(self.unit_offset)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale).astype(self.dtype)


class Attention(nn.Module):
    config: ModelConfig
    kind: Layer
    dtype: str
    lora: Lora | None

    @nn.compact
    def __call__(self, x, tables, mix):
        c = self.config
        D, H, K, h = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        linear = functools.partial(_linear, self)
        q = linear("q", (D, H, h), ("embed", "heads", "head_dim"))(x)
        k = linear("k", (D, K, h), ("embed", "kv_heads", "head_dim"))(x)
        v = linear("v", (D, K, h), ("embed", "kv_heads", "head_dim"))(x)
        if c.qk_norm:
            norm = functools.partial(RMSNorm, c.norm_eps, c.unit_offset, self.dtype)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        q, k = apply_rope(q, tables), apply_rope(k, tables)
        q = constrain(q, ("batch", "length", "heads", "head_dim"))
        k, v = (constrain(z, ("batch", "length", "kv_heads", "head_dim")) for z in (k, v))
        out, stored = mix(q, k, v)
        return linear("o", (H, h, D), ("heads", "head_dim", "embed"), inputs=2)(out), stored


class MLP(nn.Module):
    """down(activation(gate x) * up x) (SwiGLU, GEGLU: arXiv:2002.05202)."""

    config: ModelConfig
    dtype: str
    lora: Lora | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        D, F = self.config.embed_dim, self.config.mlp_dim
        linear = functools.partial(_linear, self)
        gate = linear("gate", (D, F), ("embed", "mlp"))(x)
        up = linear("up", (D, F), ("embed", "mlp"))(x)
        x = constrain(ACTIVATIONS[self.config.activation](gate) * up, ("batch", "length", "mlp"))
        return linear("down", (F, D), ("mlp", "embed"))(x)


class MoE(nn.Module):
    """A mixture of experts, x [B, T, D] -> (its output, the router's logits f32[B, T, E])."""

    config: ModelConfig
    dtype: str
    kernels: str

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        D, E, f = self.config.embed_dim, self.config.experts.count, self.config.experts.mlp_dim
        router = Linear((D, E), ("embed", "router"), self.dtype, name="router")
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", 1, 2, batch_axis=0)
        sizes = {"experts": E, "embed": D, "mlp": f}
        weights = [
            _Table(nn.with_logical_partitioning(init, names), tuple(sizes[n] for n in names), name=name)()
            for name, names in EXPERT_AXES.items()
        ]
        logits = router(x).astype(jnp.float32)
        return self._mixed(x, logits, *(weight.astype(self.dtype) for weight in weights)), logits

    def _mixed(self, x, logits, *weights):
        """The chosen experts' outputs. Over a mesh each device computes its own experts, for the rows of all devices
        along the axis `expert`: gathering rows and scattering sums needs no capacity and no token is dropped."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return self._own(x, logits, *weights)
        sizes, E = dict(mesh.shape), self.config.experts.count
        rows = partition_spec(("batch", "length", "hidden"), x.shape, sizes)
        specs = [partition_spec(a, w.shape, sizes) for a, w in zip(EXPERT_AXES.values(), weights, strict=True)]

        def local(x, logits, *weights):
            x, logits = (jax.lax.all_gather(z, "expert", axis=0, tiled=True) for z in (x, logits))
            dims = [axes.index("embed") for axes in EXPERT_AXES.values()]  # their gradients leave as they came
            over = RULES["embed"]
            weights = [jax.lax.all_gather(w, over, axis=d, tiled=True) for w, d in zip(weights, dims, strict=True)]
            first = jax.lax.axis_index("expert") * (E // sizes["expert"])
            out = self._own(x, logits, *weights, first_expert=first)
            return jax.lax.psum(jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True), "tensor")

        mapped = jax.shard_map(local, in_specs=(rows, rows, *specs), out_specs=rows, check_vma=False)
        return mapped(x, logits, *weights)

    def _own(self, x, logits, *weights, first_expert=0):
        e, tokens = self.config.experts, math.prod(x.shape[:2])
        routed = route(logits.reshape(tokens, -1), e.top_k, e.normalized)
        how = {"activation": ACTIVATIONS[self.config.activation], "kernel": self.kernels}
        flat = x.reshape(tokens, -1)
        return expert_mlp(flat, *routed, *weights, **how, first_expert=first_expert).reshape(x.shape)


class Block(nn.Module):
    """One layer, x [B, T, D] -> (x, stored, router logits f32[B, T, E] or None).

    tables: cos and sin of the layer's RoPE.
    mix: q [B, T, H, h], k, v [B, T, K, h] -> (attention's output like q, the layer's KV cache or None).
    """

    config: ModelConfig
    kind: Layer
    dtype: str
    lora: Lora | None
    kernels: str

    @nn.compact
    def __call__(self, x, tables, mix):
        c, router = self.config, None
        norm = functools.partial(RMSNorm, c.norm_eps, c.unit_offset, self.dtype)
        attend = Attention(c, self.kind, self.dtype, self.lora, name="attn")
        out, stored = attend(norm(name="attn_norm")(x), tables, mix)
        if c.post_norms:
            out = norm(name="attn_post_norm")(out)
        x = constrain(x + out, ("batch", "length", "hidden"))
        out = norm(name="mlp_norm")(x)
        if self.kind.experts:
            out, router = MoE(c, self.dtype, self.kernels, name="moe")(out)
        else:
            out = MLP(c, self.dtype, self.lora, name="mlp")(out)
        if c.post_norms:
            out = norm(name="mlp_post_norm")(out)
        return constrain(x + out, ("batch", "length", "hidden")), stored, router


class Decoder(nn.Module):
    """tokens -> hidden states after the final norm.

    Parameters: embed.weight [V, D], layers.* [n, ...] (whole pattern periods), tail.* [L - n, ...] where the pattern
    leaves some over, final_norm.scale [D], and head.weight [V, D] unless tied, or score.weight [R, D]. Where only some
    layers are mixtures of experts, layers.mlp.* and layers.moe.* hold only those that have them.
    """

    config: ModelConfig
    dtype: str
    remat: str  # a key of REMAT
    lora: Lora | None
    kernels: str  # xla | pallas | interpret
    unroll: bool  # straight code instead of a loop: 10 % quicker on CPU, slow to compile for deep models

    @nn.compact
    def __call__(self, tokens: Array, places: Places, cache: Cache | None = None, key: Array | None = None):
        """(hidden [B, T, D], cache or None, router logits f32[L, B, T, E] of the MoE layers or None).

        With a cache, the tokens continue its rows at places.positions, and the cache with them is returned. key: of the
        adapters' dropout, if any.
        """
        c = self.config
        table = self._table("embed", "vocab", c.vocab_size)
        if c.num_scores:
            self._table("score", "scores", c.num_scores)
        elif not c.tied:
            self._table("head", "vocab", c.vocab_size)
        x = lookup(table, tokens).astype(self.dtype)
        if c.scaled_embedding:
            x = x * jnp.asarray(math.sqrt(c.embed_dim), self.dtype)
        x = constrain(x, ("batch", "length", "hidden"))
        kvs = None
        if cache is not None:
            kvs, lengths = cache.layers, jnp.maximum(cache.lengths, places.positions.max(axis=1) + 1)
            mix = functools.partial(self._mix_cached, places.positions, lengths)
        else:
            mix = functools.partial(self._mix, places)
        tables = {rope: rope_tables(rope, c.head_dim, places.positions) for rope in {kind.rope for kind in c.pattern}}
        run = functools.partial(self._layers, tables=tables, mix=mix, dropout=key)
        whole = c.num_layers - c.tail_layers
        x, stored, router = run("layers", c.pattern, 0, whole, x, kvs)
        if c.tail_layers:
            rest = kvs and kvs[len(stored) :]
            x, more, last = run("tail", c.pattern[: c.tail_layers], whole, c.tail_layers, x, rest)
            stored, router = stored + more, [*router, *last]
        x = RMSNorm(c.norm_eps, c.unit_offset, self.dtype, name="final_norm")(x)
        if cache is not None:
            cache = Cache(stored, lengths)
        return x, cache, jnp.concatenate(router) if router else None

    def _mix(self, places, kind, kv, layer, q, k, v):
        """Attention among the tokens of the rows themselves."""
        c = self.config
        limits = {"scale": c.attention_scale, "window": kind.window, "soft_cap": c.attention_soft_cap}
        return attend(q, k, v, places, kernels=self.kernels, **limits), None

    def _mix_cached(self, positions, lengths, kind, kv, layer, q, k, v):
        """Attention to what the cache holds and the new tokens, which it then holds too."""
        c = self.config
        kv = extend(kv, layer, k, v, positions)
        limits = {"scale": c.attention_scale, "window": kind.window, "soft_cap": c.attention_soft_cap}
        return attend_cached(q, kv, layer, positions, lengths, kernels=self.kernels, **limits), kv

    def _table(self, name, axis, size):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "embed"))
        return _Table(init, (size, self.config.embed_dim), name=name)()

    def _layers(self, name, kinds, first, count, x, kvs, *, tables, mix, dropout):
        """`count` layers from layer `first` on: stacked ones in a loop, a step per period of `kinds`; else in a row.

        kvs: of a cache, those of these layers first. Returns x, their new ones (a tuple), and the router logits of the
        MoE layers in order: a list of [n, B, T, E].
        """
        P = len(kinds)
        blocks = [Block(self.config, kind, self.dtype, self.lora, self.kernels, parent=None) for kind in kinds]

        def init(key):
            def stack(i, key):
                """All layers whose parameters are like those of kinds[i]."""
                like = sum(kind.experts == kinds[i].experts for kind in kinds) * (count // P)

                def one(key):
                    return blocks[i].init(key, x, tables[kinds[i].rope], lambda q, k, v: (q, None))

                return jax.vmap(one)(jax.random.split(key, like))["params"]

            firsts = {kind.experts: i for i, kind in reversed(list(enumerate(kinds)))}
            stacks = [stack(i, jax.random.fold_in(key, n)) for n, i in enumerate(firsts.values())]
            return jax.tree.map(_add_layers_axis, _joined(stacks), is_leaf=_is_box)

        if self.is_initializing():
            self.param(name, init)
            return x, (), []
        params = self.variables["params"][name]  # a quantised base has other leaves than `init` makes

        def apply(i, x, own, kv, row, layer):
            rngs = None if dropout is None else {"dropout": jax.random.fold_in(dropout, layer)}
            mixed = functools.partial(mix, kinds[i], kv, row)
            return blocks[i].apply({"params": own}, x, tables[kinds[i].rope], mixed, rngs=rngs)

        if isinstance(params, tuple):
            return _in_a_row(apply, params, first, P, x, kvs)

        near, far = (params, {}) if P == 1 else _apart(params)

        def period(carry, xs):
            x, kvs = carry
            stacked, index = xs
            routers, stored = [], []
            for i in range(P):

                def step(x, stacked, kv, row, layer, i=i):
                    own = on_device(_row(stacked, kinds, i, far, row))
                    return apply(i, checkpoint_name(x, INPUT), own, kv, row, layer)

                x, kv, router = self._remat(step, P)(x, stacked, kvs and kvs[i], index, first + index * P + i)
                stored.append(kv)
                routers += [] if router is None else [router]
            return (x, kvs and tuple(stored)), jnp.stack(routers) if routers else None

        # What the backward pass reads of the scan's own slices, as they are, is not kept once more. So a layer is taken
        # out of its period inside what is computed again, and a period of one is the layer.
        periods = near if P == 1 else jax.tree.map(lambda p: p.reshape(count // P, -1, *p.shape[1:]), near)
        indices = jnp.arange(count // P, dtype=jnp.int32)
        (x, kvs), routers = jax.lax.scan(period, (x, kvs and kvs[:P]), (periods, indices), unroll=self.unroll or 1)
        return x, kvs or (), [] if routers is None else [routers.reshape(-1, *routers.shape[2:])]

    def _remat(self, function, period: int):
        if REMAT[self.remat] is None:
            return function
        # The barrier against merging both computations costs time. It is needed in straight code (jax.checkpoint), and
        # where a loop's body holds several layers: without it the compiler computes all of them again at once.
        return jax.checkpoint(function, policy=REMAT[self.remat], prevent_cse=self.unroll or period > 1)


def by_layer(params):
    """The parameters, in the host's memory only those that the layers' loop moves to the devices, a layer at a time.

    Norms [L, D] are no such: there the TPU compiler cuts no row out of a matrix.
    """
    flat = flatten_dict(params)
    stay = lambda path, leaf: path[0] in STACKS and leaf.ndim > 2  # noqa: E731
    return unflatten_dict({path: leaf if stay(path, leaf) else on_device(leaf) for path, leaf in flat.items()})


def _apart(stack):
    """(what lies on the devices, {path: leaf} of what waits in the host's memory)."""
    flat = flatten_dict(stack)
    far = {path: leaf for path, leaf in flat.items() if waits(leaf)}
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path not in far}), far


def _row(stacked, kinds, i, far, period):
    """The parameters of the i-th layer of a period; of a period of one, all.

    far: whole stacks in the host's memory, out of which the TPU compiler cuts along one dimension only.
    """
    if len(kinds) == 1:
        return stacked
    rows = {path: (leaf, stack_row(kinds, i, path[0])) for path, leaf in flatten_dict(stacked).items()}
    own = {path: leaf[row] for path, (leaf, row) in rows.items() if row is not None}
    for path, leaf in far.items():
        found = [stack_row(kinds, k, path[0]) for k in range(len(kinds))]
        if found[i] is not None:
            at = period * (len(kinds) - found.count(None)) + found[i]
            own[path] = jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False)
    return unflatten_dict(own)


class _Table(nn.Module):
    init_fn: Any
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        return self.param("weight", self.init_fn, self.shape, jnp.float32)


def unstacked(params: Any, config: ModelConfig) -> Any:
    """The parameters with a tuple of single layers for each stack: slices of a stack inside a loop are copies."""
    found, first = dict(params), 0
    for name in STACKS:
        if name in params:
            flat = flatten_dict(params[name])
            count = config.tail_layers if name == "tail" else config.num_layers - config.tail_layers
            kinds, layers = config.layers[first : first + count], []
            for i in range(count):
                rows = {path: stack_row(kinds, i, path[0]) for path in flat}
                layers.append(unflatten_dict({path: flat[path][row] for path, row in rows.items() if row is not None}))
            found[name], first = tuple(layers), first + count
    return found


def _in_a_row(apply, layers, first, period, x, kvs):
    """`Decoder._layers` of parameters and caches that are not stacked."""
    routers, stored = [], []
    for n, own in enumerate(layers):
        x, kv, router = apply(n % period, x, own, kvs and kvs[n], None, first + n)
        stored.append(kv)
        routers += [] if router is None else [router[None]]
    return x, tuple(stored) if kvs else (), routers


def _linear(module, name, shape, axes, inputs=1):
    """The product `name` of a module that has config, dtype and lora."""
    adapted = module.lora is not None and module.lora.adapts(f"{module.name}/{name}")
    lora = module.lora if adapted else None
    return Linear(shape, axes, module.dtype, inputs, name in module.config.biased, lora, name=name)


def _joined(stacks):
    """One tree of boxed parameters out of several: those of one name are concatenated along the layers."""
    joined = {}
    for path, box in (item for stack in stacks for item in flatten_dict(stack).items()):
        old = joined.get(path)
        joined[path] = box if old is None else box.replace(value=jnp.concatenate([old.value, box.value]))
    return unflatten_dict(joined)


def _is_box(x):
    return isinstance(x, nn.LogicallyPartitioned)


def _add_layers_axis(box):
    return box.replace(names=("layers", *box.names))
