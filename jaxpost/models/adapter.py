"""A model of somebody else's under our steps: any Flax module from tokens and positions to logits or hidden states.

It knows neither packed rows nor branches, so every completion becomes a plain sequence of its own inside the step:
prompts are computed once per completion, and a row costs documents_per_row * completions * its length. Give it short
rows with few documents.

    def build(path):  # model.adapter="my_package.mine:build", path: model.path
        model = MyTransformer(...)  # flax.nnx
        return from_nnx(model, vocab_size=32_000, max_positions=2048)
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpost.ops.logprobs import Head, TokenStats, logit_stats, row_logps
from jaxpost.types import Array, Batch, Rows


@dataclasses.dataclass(frozen=True)
class ForeignConfig:
    """What the stages ask of a model's config."""

    vocab_size: int
    max_positions: int  # longest sequence in tokens
    family: str = "foreign"
    experts: None = None
    num_scores: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A `Policy` in what training asks of one; made by `from_linen` or `from_nnx`.

    apply: (params, tokens int32[C, S], positions int32[C, S]) -> logits [C, S, V], or, with a head, hidden [C, S, D].
      Causal: sequences are filled from the left, and what stands behind their end must not reach them.
    params: the initial parameters, nested dicts of arrays.
    """

    apply: Callable[[Any, Array, Array], Array]
    params: Any
    config: ForeignConfig
    head: Callable[[Any], Head] | None = None
    compute_dtype: str = "float32"  # that a reference is held in; products are in the model's own

    def abstract(self) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.params)

    def axes(self) -> Any:
        """No logical axes: every device holds all of the parameters."""
        return jax.tree.map(lambda leaf: (None,) * leaf.ndim, self.params)

    def load(self, shardings: Any, dtype: str) -> Any:
        return jax.tree.map(lambda leaf, at: jax.device_put(np.asarray(leaf).astype(dtype), at), self.params, shardings)

    def fingerprint(self) -> str:
        """sha256 of the initial parameters."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{path}{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def whole(self, params: Any, frozen: Any) -> Any:
        return params

    def token_stats(
        self, params: Any, batch: Batch, *, chunk: int, key: Array | None = None
    ) -> tuple[TokenStats, None]:
        """As `Policy.token_stats`; no key reaches the model."""
        rows, documents = batch.rows, batch.example_ids.shape[1]
        branches = batch.completion["mask"].shape[2] if batch.completion else 1
        columns = sequence_columns(rows, documents, branches, min(rows.tokens.shape[1], self.config.max_positions))
        plain = plain_sequences(rows, columns)
        out = self.apply(params, plain.tokens, plain.positions)
        if self.head is None:
            stats = logit_stats(out, plain)
        else:
            stats = row_logps(out, self.head(params), plain, chunk=chunk)
        return jax.tree.map(lambda values: to_rows(values.reshape(columns.shape), rows), stats), None


def from_linen(module, params: Any, *, vocab_size: int, max_positions: int, head=None) -> Adapter:
    """Of a flax.linen module called with (tokens, positions), and its parameters. See Adapter."""

    def apply(params, tokens, positions):
        return module.apply({"params": params}, tokens, positions)

    return Adapter(apply, params, ForeignConfig(vocab_size, max_positions), head)


def from_nnx(model, *, vocab_size: int, max_positions: int, head=None) -> Adapter:
    """Of a flax.nnx module called with (tokens, positions). Its nnx.Params train, all else of it stays as it is."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(pure, tokens, positions):
        state = jax.tree.map(lambda leaf: leaf, params)  # a copy: the one below is filled in place
        nnx.replace_by_pure_dict(state, pure)
        return nnx.merge(graph, state, rest)(tokens, positions)

    return Adapter(apply, nnx.to_pure_dict(params), ForeignConfig(vocab_size, max_positions), head)


def sequence_columns(rows: Rows, documents: int, branches: int, length: int) -> Array:
    """int32[B, M, N, length]: the column of its row in which each token of a sequence stands; T behind its end.

    Sequence (m, n) is the prompt of document m + 1 and its completion n + 1; a linear document has only n = 0.
    """
    B, T = rows.tokens.shape
    columns = jnp.full((B, documents, branches, length), T, jnp.int32)
    row, column = jnp.arange(B, dtype=jnp.int32)[:, None], jnp.arange(T, dtype=jnp.int32)[None]
    for n in range(branches):
        own = (rows.segments > 0) & ((rows.branches == 0) | (rows.branches == n + 1))
        document = jnp.where(own, rows.segments - 1, documents)  # out of bounds: dropped
        columns = columns.at[row, document, n, rows.positions].set(jnp.broadcast_to(column, (B, T)), mode="drop")
    return columns


def plain_sequences(rows: Rows, columns: Array) -> Rows:
    """The sequences as rows of their own, [B * M * N, length]."""
    B, length = columns.shape[0], columns.shape[-1]
    flat = columns.reshape(B, -1)

    def pick(values):
        padded = jnp.pad(values, ((0, 0), (0, 1)))
        return jnp.take_along_axis(padded, flat, axis=1).reshape(-1, length)

    tokens, weights = pick(rows.tokens), pick(rows.weights)
    real = (pick(jnp.ones_like(rows.tokens)) > 0).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    return Rows(tokens, real, jnp.zeros_like(tokens), positions, weights)


def to_rows(values: Array, rows: Rows) -> Array:
    """[B, T]: where a token of the rows is a target, its value out of those of the sequences [B, M, N, length]."""
    document, branch = (jnp.maximum(ids - 1, 0) for ids in (rows.segments, rows.branches))
    row = jnp.arange(len(values), dtype=jnp.int32)[:, None]
    return jnp.where(rows.weights != 0, values[row, document, branch, rows.positions], 0)
