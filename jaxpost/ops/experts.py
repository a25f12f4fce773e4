"""Mixtures of experts without a capacity: every token reaches all of its experts (dropless, arXiv:2211.15841)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

from jaxpost.types import Array

TILE = 384 * 2048  # weights of a tile at most: with f32 accumulator and two buffers they take 9 MiB of VMEM in f32
WHOLE = 3072  # longest sum that a tile spans


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
    kernel: str = "xla",
) -> Array:
    """Sum over a token's experts of weight * down(activation(gate x) * up x), [N, D].

    The (token, expert) assignments are sorted by expert, so that each product is one `grouped_product`. Where the
    weights are a shard of the experts, the others' assignments are sorted to the end, belong to no group, and add
    nothing. All tokens may want the same shard, so there are N * min(k, e) rows, however few belong to a group.

    Args:
      x: [N, D].
      weights, experts: as `route` gives them, [N, k].
      gate, up: [e, D, f]; down: [e, f, D]: the experts first_expert .. first_expert + e - 1.
      kernel: of `grouped_product`.
    """
    N, k = experts.shape
    own = experts.reshape(-1) - first_expert
    group = jnp.where((own >= 0) & (own < len(gate)), own, len(gate))
    order = jnp.argsort(group, stable=True)
    sizes = jnp.bincount(group, length=len(gate)).astype(jnp.int32)
    rows = x[order[: N * min(k, len(gate))] // k]
    product = functools.partial(grouped_product, sizes=sizes, kernel=kernel)
    out = product(activation(product(rows, gate)) * product(rows, up), down)
    out = out.at[jnp.argsort(order)].get(mode="fill", fill_value=0).reshape(N, k, -1)
    return jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype))


def grouped_product(rows: Array, weights: Array, sizes: Array, *, kernel: str) -> Array:
    """[M, n]: rows [M, m], which lie group by group, each times the weights [e, m, n] of its group.

    sizes: int32[e], rows of each group. The rows after the last group give zeros, and get and give no gradient.
    kernel: "xla" is jax.lax.ragged_dot: exact, but dense (every row with every group's weights) on CPU, and
      on TPU in the gradient of the weights.
      "pallas" is the TPU kernel that ships with jax (megablox), which visits only tiles of rows that have a group;
      over a mesh inside a shard_map with check_vma=False. "interpret": the same without a TPU, slowly.
    """
    M = len(rows)
    if kernel == "xla":
        out = jax.lax.ragged_dot(rows, weights, sizes)
        return jnp.where((jnp.arange(M, dtype=jnp.int32) < sizes.sum())[:, None], out, 0)
    if kernel not in ("pallas", "interpret"):
        raise ValueError(f'kernel {kernel!r}: one of "xla", "pallas", "interpret"')
    padded = -(-M // 16) * 16 if M <= 128 else -(-M // 128) * 128 if M <= 512 else -(-M // 512) * 512
    rows = jnp.pad(rows, ((0, padded - M), (0, 0)))
    # The rest is a group without weights here: only then does the kernel write zeros where it computes nothing, in the
    # product and in the gradient of the rows; otherwise that memory holds anything.
    sizes = jnp.append(sizes, padded - sizes.sum())
    return gmm(rows, weights, sizes, rows.dtype, tiles, None, None, False, kernel == "interpret")[:M]


def tiles(M: int, m: int, n: int) -> tuple[int, int, int]:
    """Tile of a product [M, m] x [m, n], and of its weights' gradient, a sum over M.

    Chosen by counting what is moved, not by measurement. Experts are many and small: 128 rows, since each group
    computes up to one tile more than its rows fill, and the whole of m, since a group's weights then stay in VMEM while
    its rows pass. Where m is too long for that, weights are read again for every tile of rows: 512 rows.
    """
    if m <= WHOLE:
        rows, m_tile, n_tile = 128, m, max(128, TILE // m // 128 * 128)
    else:
        rows, m_tile, n_tile = 512, 1024, 512
    return min(rows, M), m_tile, min(n_tile, n)


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
