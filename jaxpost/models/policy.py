"""How a step sees a model: pure functions of its parameters."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.errors import ConfigError
from jaxpost.models.cache import Cache, new_cache
from jaxpost.models.config import ModelConfig
from jaxpost.models.decoder import REMAT, Decoder, by_layer, unstacked
from jaxpost.models.lora import Lora, joined
from jaxpost.models.sharded import row_stats
from jaxpost.ops.attention import Places
from jaxpost.ops.logprobs import Head, TokenStats
from jaxpost.sharding.memory import on_device
from jaxpost.types import Array, Batch, Rows


@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder, without its parameters. Hashable, so that it can be a static argument of jit.

    Parameters are plain nested dicts, f32 when initialised; whatever their type, products are in `compute_dtype`.
    """

    config: ModelConfig
    compute_dtype: str = "float32"
    remat: str = "none"  # a key of decoder.REMAT: how much the backward pass computes again
    lora: Lora | None = None  # adapters, whose leaves are then part of the parameters
    platform: str | None = None  # cpu | gpu | tpu: where it will run; None = the default backend
    kernels: str | None = None  # xla | pallas | interpret (pallas without a TPU); None = pallas on a TPU
    unroll: bool | None = None  # layers as straight code; None = on a CPU

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ConfigError(f"remat.policy: {self.remat!r} is unknown; known: {', '.join(REMAT)}")

    @property
    def unrolled(self) -> bool:
        return self._platform == "cpu" if self.unroll is None else self.unroll

    @property
    def _platform(self) -> str:
        return self.platform or jax.default_backend()

    def _decoder(self) -> Decoder:
        kernels = self.kernels or ("pallas" if self._platform == "tpu" else "xla")
        return Decoder(self.config, self.compute_dtype, self.remat, self.lora, kernels, self.unrolled)

    def _init(self, key):
        # Parameters do not depend on the number of rows, but the layout of rows does: one that every mesh divides.
        rows = jnp.zeros((max(1, jax.sharding.get_abstract_mesh().size), 1), jnp.int32)
        return self._decoder().init(key, rows, Places(rows, rows, rows))["params"]

    def init(self, key: Array) -> Any:
        """Fresh f32 parameters. jit it with `out_shardings` so that they are born in their shards."""
        return nn.unbox(self._init(key))

    def abstract(self) -> Any:
        """The parameters as jax.ShapeDtypeStruct."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def axes(self) -> Any:
        """The logical axes of every parameter, a tuple of names each (sharding.rules.RULES)."""
        boxes = jax.eval_shape(self._init, jax.random.key(0))
        return jax.tree.map(lambda box: box.names, boxes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))

    def whole(self, params: Any, frozen: Any) -> Any:
        """All parameters, out of those that train and those that stay: `frozen["base"]` of an adapted model."""
        return params if self.lora is None else joined(frozen["base"], params)

    def hidden(self, params: Any, rows: Rows, key: Array | None = None) -> tuple[Array, Array | None]:
        """Hidden states after the final norm, [B, T, D] in `compute_dtype`, and what the routers said.

        The second is f32[L, B, T, E], the logits of the layers that are mixtures of experts (ops.experts.balance_loss
        takes them), or None where there are none. key: of the adapters' dropout; None: without.
        """
        places = Places(rows.segments, rows.branches, rows.positions)
        params = by_layer(params)
        hidden, _, router = self._decoder().apply({"params": params}, rows.tokens, places, key=key)
        return hidden, router

    def token_stats(
        self, params: Any, batch: Batch, *, chunk: int, key: Array | None = None
    ) -> tuple[TokenStats, Array | None]:
        """(TokenStats [B, T] where the rows' weights are not 0, router logits as `hidden` gives them).

        All that an objective asks of a model. chunk: positions whose logits are held at once (ops.logprobs).
        """
        hidden, router = self.hidden(params, batch.rows, key)
        return row_stats(hidden, self.head(params), batch.rows, chunk=chunk), router

    def head(self, params: Any) -> Head:
        weight = on_device(params["embed" if self.config.tied else "head"]["weight"])
        return Head(weight, soft_cap=self.config.logit_soft_cap)

    def scores(self, params: Any, hidden: Array) -> Array:
        """f32[B, T, R] of a model with scalar heads (`config.num_scores` R) at hidden states [B, T, D]."""
        weight = params["score"]["weight"].astype(hidden.dtype)
        return jnp.einsum("btd,rd->btr", hidden, weight, preferred_element_type=jnp.float32)

    def prepared(self, params: Any) -> Any:
        """The parameters as `decode` reads them fastest: weights in the compute type, layers apart where unrolled.

        To be jit-compiled, once for many steps; it computes with them just what it computes with `params`.
        """
        cast = lambda path, leaf: leaf.astype(self.compute_dtype) if path[-1] in ("weight", "bias") else leaf  # noqa: E731
        params = unflatten_dict({path: cast(path, leaf) for path, leaf in flatten_dict(on_device(params)).items()})
        return unstacked(params, self.config) if self.unrolled else params

    def new_cache(self, batch: int, length: int, *, chunk: int = 1, quantized: bool = False) -> Cache:
        """An empty cache of `length` tokens for each of `batch` rows, for `prepared` parameters.

        chunk: most tokens that one call of `decode` adds to a row. quantized: int8 keys and values.
        """
        sizes = {"chunk": chunk, "dtype": self.compute_dtype, "quantized": quantized, "stacked": not self.unrolled}
        return new_cache(self.config, batch, length, **sizes)

    def decode(self, params: Any, tokens: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """Continues every row of the cache by up to T tokens: a piece of a prompt (prefill) or one token (a step).

        Args:
          params: as `prepared` returns them.
          tokens: int32[B, T].
          positions: int32[B, T]: those after what the row's cache holds, in order; then -1, where there is no token.
          cache: of rows long enough for them.

        Returns:
          hidden [B, T, D] (meaningless where there is no token) and the cache with the tokens.
        """
        hidden, cache, _ = self._decoder().apply({"params": params}, tokens, Places(positions, None, positions), cache)
        return hidden, cache
