"""Low-rank adapters (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353).

An adapted product is x W + scale * (x A) B; A is drawn, B is 0, so a new adapter changes nothing. With DoRA the sum is
scaled per output to a trained magnitude. The leaves lie beside the weight they adapt, under names that begin with
`lora_`, so the parameters of an adapted model are its base and its adapters merged.
"""

import collections
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.errors import ConfigError
from jaxpost.models.config import ModelConfig
from jaxpost.models.quantize import weight_of
from jaxpost.sharding.memory import on_device
from jaxpost.types import Array

PREFIX = "lora_"
HEADS = "score"  # module of a reward model's scalar heads, which train as they are
MODULES = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """How a model is adapted. Static, as all that a Policy is made of."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # regular expressions, searched in the names of MODULES
    rslora: bool = False  # alpha / sqrt(rank) in place of alpha / rank
    dora: bool = False
    dropout: float = 0.0  # share of the inputs of A that a training step leaves out

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, module: str) -> bool:
        return any(re.search(pattern, module) for pattern in self.targets)


def modules_of(config: ModelConfig) -> tuple[str, ...]:
    """The products of a model that can be adapted: all but a mixture's router and experts."""
    dense = any(not layer.experts for layer in config.layers)
    return tuple(module for module in MODULES if dense or not module.startswith("mlp/"))


def check_targets(lora: Lora, config: ModelConfig) -> None:
    """Raises ConfigError where a pattern matches nothing: that would train nothing, or less than was meant."""
    modules = modules_of(config)
    for pattern in lora.targets:
        try:
            found = any(re.search(pattern, module) for module in modules)
        except re.error as error:
            raise ConfigError(f"lora.targets: {pattern!r} is not a regular expression ({error})") from None
        if not found:
            raise ConfigError(f"lora.targets: {pattern!r} matches none of {', '.join(modules)}")
    if not lora.targets:
        raise ConfigError(f"lora.targets: empty; name some of {', '.join(modules)}")


def split(params: Any) -> tuple[Any, Any]:
    """(base, adapters) of a tree of dicts. With the adapters go the scalar heads of a reward model."""
    flat = flatten_dict(params)
    parts = {False: {}, True: {}}
    for path, leaf in flat.items():
        parts[path[-1].startswith(PREFIX) or path[0] == HEADS][path] = leaf
    return unflatten_dict(parts[False]), unflatten_dict(parts[True])


def joined(base: Any, adapters: Any) -> Any:
    """The parameters of the adapted model. No array is copied."""
    return unflatten_dict(flatten_dict(base) | flatten_dict(adapters))


def column_norms(weight: Array, inputs: int) -> Array:
    """f32: Euclidean norm over the first `inputs` dimensions: of what leads to each output."""
    return jnp.sqrt(jnp.square(weight.astype(jnp.float32)).sum(tuple(range(inputs))))


def delta(a: Array, b: Array, scale: float, inputs: int) -> Array:
    """f32[*ins, *outs] of A [*ins, r] and B [r, *outs]: what the adapter adds to the weight."""
    width = math.prod(a.shape[:inputs])
    product = a.astype(jnp.float32).reshape(width, -1) @ b.astype(jnp.float32).reshape(b.shape[0], -1)
    return scale * product.reshape(*a.shape[:inputs], *b.shape[1:])


def merged(params: Any, lora: Lora) -> Any:
    """The parameters of a plain model that computes the same: weights with their adapters worked in.

    What was quantised is plain again, in the type of the embedding.
    """
    dtype = str(params["embed"]["weight"].dtype)
    modules = collections.defaultdict(dict)
    for (*module, name), leaf in flatten_dict(params).items():
        modules[tuple(module)][name] = leaf
    found = {}
    for module, leaves in modules.items():
        if any(name.startswith((PREFIX, "weight_")) for name in leaves):
            bias = {name: leaf for name, leaf in leaves.items() if name == "bias"}
            # One at a time: programs with collectives that overlap can wait for each other on simulated devices.
            leaves = {"weight": jax.block_until_ready(_worked_in(leaves, lora.scale, dtype)), **bias}
        found |= {(*module, name): leaf for name, leaf in leaves.items()}
    return unflatten_dict(found)


@functools.partial(jax.jit, static_argnums=2)
def _worked_in(leaves, scale, dtype):
    """The weight of a product with its adapter, if it has one; leaves of all layers of a stack [L, ...]."""

    def one(leaves):
        whole = weight_of(leaves, "float32")
        if PREFIX + "a" in leaves:
            inputs = leaves[PREFIX + "a"].ndim - 1
            whole = whole + delta(leaves[PREFIX + "a"], leaves[PREFIX + "b"], scale, inputs)
            if PREFIX + "magnitude" in leaves:
                whole = whole * (leaves[PREFIX + "magnitude"].astype(jnp.float32) / column_norms(whole, inputs))
        return whole.astype(dtype)

    return jax.vmap(one)(on_device(leaves))


def with_magnitudes(adapters: Any, base: Any) -> Any:
    """Adapters whose DoRA magnitudes, if there are any, are the norms of the base: they change nothing then."""
    flat = flatten_dict(adapters)
    for path, leaf in flat.items():
        if path[-1] == PREFIX + "magnitude":
            inputs, leaves = flat[(*path[:-1], PREFIX + "a")].ndim - 2, base
            for name in path[:-1]:
                leaves = leaves[name]
            norms = jax.jit(jax.vmap(lambda leaves, n=inputs: column_norms(weight_of(leaves, "float32"), n)))
            found = jax.device_put(norms(on_device(leaves)).astype(leaf.dtype), leaf.sharding)
            flat[path] = jax.block_until_ready(found)  # one at a time, as in `merged`
    return unflatten_dict(flat)


def fresh(abstract: Any, base: Any, key: Array) -> Any:
    """New adapters like `abstract`: A uniform with variance 1 / (3 * inputs), as PEFT draws it, the rest zero.

    base: all parameters beneath, the heads of a reward model among them. To be jit-compiled with the shardings of the
    result; `with_magnitudes` completes those of DoRA.
    """

    def draw(number, path, leaf):
        if path[0] == HEADS:
            return on_device(base[HEADS][path[-1]]).astype(leaf.dtype)
        if path[-1] != PREFIX + "a":
            return jnp.zeros(leaf.shape, leaf.dtype)
        width = 1 / math.sqrt(math.prod(leaf.shape[1:-1]))
        return jax.random.uniform(jax.random.fold_in(key, number), leaf.shape, leaf.dtype, -width, width)

    flat = flatten_dict(abstract)
    drawn = {path: draw(number, path, leaf) for number, (path, leaf) in enumerate(sorted(flat.items()))}
    return unflatten_dict(drawn)
