"""How a step sees a model: pure functions of its parameters."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpost.errors import ConfigError
from jaxpost.models.config import ModelConfig
from jaxpost.models.decoder import REMAT, Cache, Decoder
from jaxpost.models.lora import Lora, joined
from jaxpost.ops.attention import Places
from jaxpost.ops.logprobs import Head, TokenStats, row_logps
from jaxpost.types import Array, Batch, Rows


@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder, without its parameters. Hashable, so that it can be a static argument of jit.

    Parameters are plain nested dicts, f32 when initialised; whatever their type, products are in `compute_dtype`.
    """

    config: ModelConfig
    compute_dtype: str = "float32"
    remat: str = "none"  # none | full | dots | dots_no_batch: how much the backward pass computes again
    lora: Lora | None = None  # adapters, whose leaves are then part of the parameters
    unroll: bool | None = None  # layers as straight code; None = where the default backend is a CPU

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ConfigError(f"remat.policy: {self.remat!r} is unknown; known: {', '.join(REMAT)}")

    def _decoder(self) -> Decoder:
        unroll = jax.default_backend() == "cpu" if self.unroll is None else self.unroll
        return Decoder(self.config, self.compute_dtype, self.remat, self.lora, unroll)

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
        hidden, _, router = self._decoder().apply({"params": params}, rows.tokens, places, key=key)
        return hidden, router

    def token_stats(
        self, params: Any, batch: Batch, *, chunk: int, key: Array | None = None
    ) -> tuple[TokenStats, Array | None]:
        """(TokenStats [B, T] where the rows' weights are not 0, router logits as `hidden` gives them).

        All that an objective asks of a model. chunk: positions whose logits are held at once (ops.logprobs).
        """
        hidden, router = self.hidden(params, batch.rows, key)
        return row_logps(hidden, self.head(params), batch.rows, chunk=chunk), router

    def head(self, params: Any) -> Head:
        weight = params["embed" if self.config.tied else "head"]["weight"]
        return Head(weight, soft_cap=self.config.logit_soft_cap)

    def scores(self, params: Any, hidden: Array) -> Array:
        """f32[B, T, R] of a model with scalar heads (`config.num_scores` R) at hidden states [B, T, D]."""
        weight = params["score"]["weight"].astype(hidden.dtype)
        return jnp.einsum("btd,rd->btr", hidden, weight, preferred_element_type=jnp.float32)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of `length` slots for `batch` rows."""
        c = self.config
        kv = jnp.zeros((c.num_layers, batch, length, c.num_kv_heads, c.head_dim), self.compute_dtype)
        return Cache(kv, kv, jnp.full((batch, length), -1, jnp.int32), jnp.int32(0))

    def decode(self, params: Any, tokens: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """Continues every row of the cache by T tokens: a prompt (prefill) or one token (a step).

        Args:
          tokens: int32[B, T].
          positions: int32[B, T], -1 on padding (left, right or between): never seen by any query.
          cache: with T free slots; past its end the oldest result would be overwritten, so callers size it.

        Returns:
          hidden [B, T, D] (meaningless on padding) and the cache, T slots longer.
        """
        places = Places((positions >= 0).astype(jnp.int32), None, positions)
        hidden, cache, _ = self._decoder().apply({"params": params}, tokens, places, cache)
        return hidden, cache
