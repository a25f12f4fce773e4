"""Attention over packed, branching rows: one function for training and for decoding against a cache."""

import jax
import jax.numpy as jnp

from jaxpost.types import Array, record

CHUNK = 128  # queries a product: on CPU 128 is quickest (145 ms against 506 for one dense product)
MOST_CHUNKS = 32  # the loop is unrolled; longer rows get longer chunks


@record
class Places:
    """Where tokens stand. int32[B, T] each; `branches` is None where no document has any."""

    segments: Array
    branches: Array | None
    positions: Array


def visible(queries: Places, keys: Places, first_query: Array | int = 0, window: int | None = None) -> Array:
    """bool[B, T, S]: which keys a query sees (the rule of types.Rows; `window` is a distance in positions).

    first_query: row index of the first query when the keys' row begins before it (decoding, chunks).
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
    first_query: Array | int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Grouped-query attention [B, T, H, h]; softmax in f32; keys and values are not repeated per query head.

    Args:
      q: [B, T, H, h]; query head n reads key head n // (H / K).
      k, v: [B, S, K, h].
      queries, keys: places of the T queries and the S keys.
      scale: factor on the scores before `soft_cap` (cap * tanh(score / cap), Gemma 2).
      first_query: row index among the keys of the first query; a static 0 (training) lets chunks stop at their end.
      window: a query sees keys less than this many positions back.
    """
    B, T, H, h = q.shape
    S, K = k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != h or H % K:
        raise ValueError(f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit [B, T, H, h], [B, S, K, h]")
    q = q.reshape(B, T, K, H // K, h)
    training = isinstance(first_query, int)
    chunk = CHUNK * -(-T // (CHUNK * MOST_CHUNKS))
    out = []
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        last = min(first_query + end, S) if training else S  # no query of this chunk sees a later key
        places = jax.tree.map(lambda x: x[:, start:end], queries)  # noqa: B023
        seen = jax.tree.map(lambda x: x[:, :last], keys)  # noqa: B023
        mask = visible(places, seen, first_query + start, window)
        out.append(_dense(q[:, start:end], k[:, :last], v[:, :last], mask, scale, soft_cap))
    return jnp.concatenate(out, axis=1).reshape(B, T, H, h)


def _dense(q, k, v, mask, scale, soft_cap):
    """q [B, T, K, G, h], k and v [B, S, K, h], mask [B, T, S]. A kernel for an accelerator replaces the loop above."""
    scores = jnp.einsum("BTKGh,BSKh->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    # Finite: a query that sees nothing (padding of a prompt) must give no NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.float32(-1e30))
    probs = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("BKGTS,BSKh->BTKGh", probs.astype(v.dtype), v)
