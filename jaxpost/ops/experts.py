"""Mixtures of experts without a capacity: every token reaches all of its experts (dropless, arXiv:2211.15841)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpost.types import Array


def route(logits: Array, top_k: int, normalized: bool) -> tuple[Array, Array]:
    """(weights f32[N, k], experts int32[N, k]) of router logits [N, E]: the k most probable experts of each token."""
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probs, top_k)
    if normalized:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights, experts


def expert_mlp(
    x: Array,
    weights: Array,
    experts: Array,
    gate: Array,
    up: Array,
    down: Array,
    *,
    activation: Callable,
    first_expert: Array | int = 0,
) -> Array:
    """Sum over a token's experts of weight * down(activation(gate x) * up x), [N, D].

    The (token, expert) assignments are sorted by expert, so that each product is one grouped product
    (jax.lax.ragged_dot). Where the weights are a shard of the experts, the others' assignments are sorted to the end,
    belong to no group, and add nothing.

    Args:
      x: [N, D].
      weights, experts: as `route` gives them, [N, k].
      gate, up: [e, D, f]; down: [e, f, D]: the experts first_expert .. first_expert + e - 1.
    """
    N, k = experts.shape
    own = experts.reshape(-1) - first_expert
    group = jnp.where((own >= 0) & (own < len(gate)), own, len(gate))
    order = jnp.argsort(group, stable=True)
    sizes = jnp.bincount(group, length=len(gate)).astype(jnp.int32)
    rows = x[order // k]
    hidden = activation(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(hidden, down, sizes)
    out = jnp.where((jnp.arange(N * k, dtype=jnp.int32) < sizes.sum())[:, None], out, 0)
    out = out[jnp.argsort(order)].reshape(N, k, -1)
    return jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype))


def balance_loss(logits: Array, top_k: int, mask: Array) -> Array:
    """Load-balancing loss f32[] over all layers together: E * sum_e f_e P_e (arXiv:2101.03961, equations 4 to 6).

    f_e: share of the tokens that are sent to expert e, of k (so it is k where the load is even); P_e: mean probability
    of e. It is a statistic of the tokens at hand: over a microbatch where a step has several.

    Args:
      logits: f32[L, B, T, E], of the router of each layer.
      mask: f32[B, T], 1 on tokens that count.
    """
    E = logits.shape[-1]
    share, probs = expert_load(logits, top_k, mask), jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    tokens = jnp.maximum(mask.sum(), 1) * logits.shape[0]
    mean_probs = jnp.einsum("lbte,bt->e", probs, mask) / tokens
    return E * jnp.sum(share.mean(axis=0) * mean_probs)


def expert_load(logits: Array, top_k: int, mask: Array) -> Array:
    """f32[L, E]: tokens sent to each expert, over the tokens of the mask (sums to k in each layer)."""
    _, chosen = jax.lax.top_k(logits, top_k)
    hits = jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32).sum(axis=-2)
    return jnp.einsum("lbte,bt->le", hits, mask) / jnp.maximum(mask.sum(), 1)
