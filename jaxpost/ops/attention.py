"""Attention over packed, branching rows, and of new tokens to a cache."""

import jax
import jax.numpy as jnp

from jaxpost.types import Array, record

CHUNK = 128  # queries a product; on CPU a third of the time of one dense product at T 1024
MOST_CHUNKS = 32  # the loop is unrolled; longer rows get longer chunks


@record
class Places:
    """Where tokens stand. int32[B, T] each; `branches` is None where no document has any."""

    segments: Array
    branches: Array | None
    positions: Array


def visible(queries: Places, keys: Places, first_query: Array | int = 0, window: int | None = None) -> Array:
    """bool[B, T, S]: which keys a query sees (the rule of types.Rows; `window` is a distance in positions).

    first_query: row index of the first query when the keys' row begins before it (chunks).
    """
    query_at = jnp.arange(queries.segments.shape[1], dtype=jnp.int32)[:, None] + first_query
    key_at = jnp.arange(keys.segments.shape[1], dtype=jnp.int32)[None, :]
    sees = (key_at <= query_at)[None] & (queries.segments[:, :, None] == keys.segments[:, None, :])
    if queries.branches is not None:
        branches = keys.branches[:, None, :]
        sees &= (branches == 0) | (branches == queries.branches[:, :, None])
    if window is not None:
        sees &= queries.positions[:, :, None] - keys.positions[:, None, :] < window
    return sees


def attention(
    q: Array,
    k: Array,
    v: Array,
    queries: Places,
    keys: Places,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    first_query: Array | int = 0,
) -> Array:
    """Grouped-query attention [B, T, H, h]; softmax in f32; keys and values are not repeated per query head.

    Args:
      q: [B, T, H, h]; query head n reads key head n // (H / K).
      k, v: [B, S, K, h].
      queries, keys: places of the T queries and the S keys.
      scale: factor on the scores before `soft_cap` (cap * tanh(score / cap), Gemma 2).
      window: a query sees keys less than this many positions back.
      first_query: row index of the first query, where the queries are a part of the keys' row.
    """
    B, T, H, h = q.shape
    S, K = k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != h or H % K:
        raise ValueError(f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit [B, T, H, h], [B, S, K, h]")
    q = q.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    chunk = CHUNK * -(-T // (CHUNK * MOST_CHUNKS))
    out, whole = [], isinstance(first_query, int) and first_query == 0
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        last = min(end, S) if whole else S  # no query of this chunk sees a later key
        places = jax.tree.map(lambda x: x[:, start:end], queries)  # noqa: B023
        seen = jax.tree.map(lambda x: x[:, :last], keys)  # noqa: B023
        mask = visible(places, seen, first_query + start, window)
        out.append(_attend(q[:, :, :, start:end], k[..., :last], v[:, :, :last], mask, scale, soft_cap))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)


def cached_attention(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    key_positions: Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    """`attention` [B, T, H, h] of T new tokens to a cache that holds them too.

    Args:
      q: [B, T, H, h].
      k, v: [B, K, S, h], as a cache keeps them.
      positions, key_positions: int32[B, T] and [B, S]; a key is seen from its position on, one below 0 never.
    """
    B, T, H, h = q.shape
    K = k.shape[1]
    distance = positions[:, :, None] - key_positions[:, None, :]
    mask = (distance >= 0) & (key_positions >= 0)[:, None]
    if window is not None:
        mask &= distance < window
    q = q.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
    out = _attend(q, k.swapaxes(2, 3), v, mask, scale, soft_cap)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)


def _attend(q, k, v, mask, scale, soft_cap):
    """[B, K, G, T, h] of q like it, k [B, K, h, S], v [B, K, S, h], mask [B, T, S].

    The G query heads of a key head are rows of one product, so keys and values are read once. A kernel for an
    accelerator replaces this function and the loop around it.
    """
    B, K, G, T, h = q.shape
    scores = jnp.matmul(q.reshape(B, K, G * T, h), k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    # Finite: a query that sees nothing (padding of a prompt) must give no NaN.
    scores = jnp.where(mask[:, None, None], scores.reshape(B, K, G, T, -1), jnp.float32(-1e30))
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return (probs.reshape(B, K, G * T, -1) @ v).reshape(q.shape)
