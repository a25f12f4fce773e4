"""Low-rank adapters (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353).

An adapted product is x W + scale * (x A) B; A is drawn, B is 0, so a new adapter changes nothing. With DoRA the sum is
scaled per output to a trained magnitude. The leaves lie beside the weight they adapt, under names that begin with
`lora_`, so the parameters of an adapted model are its base and its adapters merged.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.errors import ConfigError
from jaxpost.models.config import ModelConfig
from jaxpost.types import Array

PREFIX = "lora_"
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
    """(base, adapters) of a tree of dicts."""
    flat = flatten_dict(params)
    parts = [{k: v for k, v in flat.items() if k[-1].startswith(PREFIX) == own} for own in (False, True)]
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


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
    """The parameters of a plain model that computes the same: weights with their adapters worked in."""
    flat = flatten_dict(params)
    plain = {path: leaf for path, leaf in flat.items() if not path[-1].startswith(PREFIX)}
    for path in [path[:-1] for path in flat if path[-1] == PREFIX + "a"]:
        weight, a, b = (flat[(*path, name)] for name in ("weight", PREFIX + "a", PREFIX + "b"))
        plain[(*path, "weight")] = _worked_in(weight, a, b, flat.get((*path, PREFIX + "magnitude")), lora.scale)
    return unflatten_dict(plain)


@jax.jit
def _worked_in(weight, a, b, magnitude, scale):
    """Of all layers of a stack [L, ...]."""
    inputs = a.ndim - 2

    def one(weight, a, b, magnitude):
        whole = weight.astype(jnp.float32) + delta(a, b, scale, inputs)
        if magnitude is not None:
            whole = whole * (magnitude.astype(jnp.float32) / column_norms(whole, inputs))
        return whole.astype(weight.dtype)

    return jax.vmap(one, in_axes=(0, 0, 0, None if magnitude is None else 0))(weight, a, b, magnitude)


def with_magnitudes(adapters: Any, base: Any) -> Any:
    """Adapters whose DoRA magnitudes, if there are any, are the norms of the base: they change nothing then."""
    flat, weights = flatten_dict(adapters), flatten_dict(base)
    for path, leaf in flat.items():
        if path[-1] == PREFIX + "magnitude":
            inputs = flat[(*path[:-1], PREFIX + "a")].ndim - 2
            norms = jax.jit(jax.vmap(lambda w, n=inputs: column_norms(w, n)))
            flat[path] = norms(weights[(*path[:-1], "weight")]).astype(leaf.dtype)
    return unflatten_dict(flat)
