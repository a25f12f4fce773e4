"""Log-probabilities of tokens from hidden states, without ever holding [B, T, V].

The head's product is made in chunks of positions, forward and again backward (its gradient accumulates in f32: a bf16
accumulator is 2 % off). Positions that nobody asked for are sorted to the end of their row and never computed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxpost.ops.chunks import (
    add_gradients,
    finished_gradients,
    permute,
    plan,
    products,
    put,
    restore,
    take,
    zero_gradients,
)
from jaxpost.types import Array, Rows, record


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["scale", "soft_cap"])
@dataclasses.dataclass(frozen=True)
class Head:
    """logits = cap(scale * (hidden @ weight.T + bias)), cap(u) = soft_cap * tanh(u / soft_cap)."""

    weight: Array  # [V, D]
    bias: Array | None = None  # [V]
    scale: float = 1.0
    soft_cap: float | None = None


@record
class TokenStats:
    """Per position, f32, 0 where not asked for. Only `logps` and `entropy` (nats) carry gradients."""

    logps: Array
    entropy: Array
    mean_logit: Array  # mean over the vocabulary
    log_sum_sq_probs: Array  # log of sum_v p_v^2 (WPO's weight)
    is_top1: Array  # 1 where the target is the most likely token


def row_logps(hidden: Array, head: Head, rows: Rows, *, temperature: float = 1.0, chunk: int = 1024) -> TokenStats:
    """Statistics [B, T] aligned with `rows.tokens` as targets; computed where `rows.weights` is not 0.

    hidden [B, T, D] at t predicts the token at t + 1 (types.Rows says why no gather is needed).
    """
    later = lambda x: jnp.roll(x, -1, axis=1)  # noqa: E731
    scored = later(rows.weights != 0).at[:, -1].set(False)
    stats = token_logps(hidden, head, later(rows.tokens), scored, temperature=temperature, chunk=chunk)
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), stats)  # the last position is unscored, so 0 comes in front


def logit_stats(logits: Array, rows: Rows, *, temperature: float = 1.0) -> TokenStats:
    """As `row_logps`, of logits [B, T, V] that are there already: for models that return no hidden states."""
    z = logits.astype(jnp.float32)[:, :-1] / temperature
    logp = jax.nn.log_softmax(z, axis=-1)
    prob, targets = jnp.exp(logp), rows.tokens[:, 1:, None]
    of_target = jnp.take_along_axis(logp, targets, axis=-1)[..., 0]
    constant = jax.lax.stop_gradient(
        (z.mean(-1), jnp.log((prob * prob).sum(-1)), (of_target >= logp.max(-1)).astype(jnp.float32))
    )
    values = TokenStats(of_target, -(prob * logp).sum(-1), *constant)
    scored = rows.weights[:, 1:] != 0
    return jax.tree.map(lambda x: jnp.pad(jnp.where(scored, x, 0), ((0, 0), (1, 0))), values)


def logits(hidden: Array, head: Head) -> Array:
    """f32[N, V] of hidden [N, D]: for the few positions that a sampler needs, never for a batch of rows."""
    return products(hidden, head.weight.astype(hidden.dtype), head.bias, head.scale, head.soft_cap)[1]


def token_logps(
    hidden: Array,
    head: Head,
    targets: Array,
    scored: Array | None = None,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> TokenStats:
    """Log-probability and entropy of `targets` under softmax(logits / temperature).

    Args:
      hidden: [B, T, D]; the state at t predicts targets[:, t].
      head: the unembedding; products are made in the type of `hidden`, everything after them in f32.
      targets: int32[B, T], in [0, V) where scored.
      scored: bool[B, T], the positions asked for (default: all).
      temperature: divides the logits, as the sampler does.
      chunk: positions (over all rows) whose logits are held at once.
    """
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2]:
        raise ValueError(f"token_logps wants hidden [B, T, D] and targets [B, T], not {hidden.shape}, {targets.shape}")
    if scored is None:
        scored = jnp.ones(targets.shape, bool)
    width = max(1, min(chunk // targets.shape[0], targets.shape[1]))
    static = (width, float(temperature), head.scale, head.soft_cap)
    outputs = _chunked(static, hidden, head.weight, head.bias, targets, scored)
    return TokenStats(*outputs[:2], *jax.lax.stop_gradient(outputs[2:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, hidden, weight, bias, targets, scored):
    return _forward(static, hidden, weight, bias, targets, scored)[0]


def _forward(static, hidden, weight, bias, targets, scored):
    width = static[0]
    order, count = plan(scored, width)
    # Zeros where not asked for: a chunk may hold such positions of a shorter row.
    sorted_hidden = permute(jnp.where(scored[..., None], hidden, 0), order, width)
    sorted_targets = permute(targets, order, width)
    table = weight.astype(hidden.dtype)

    def body(i, outputs):
        h, y = take(sorted_hidden, i, width), take(sorted_targets, i, width)
        raw, z, _ = _scores(static, h, table, bias)
        top = z.max(-1)
        shifted = z - top[:, None]
        exp = jnp.exp(shifted)
        total = exp.sum(-1)
        lse = jnp.log(total)
        pick = lambda x: jnp.take_along_axis(x, y[:, None], axis=-1)[:, 0]  # noqa: E731
        new = (
            pick(shifted) - lse,
            lse - (exp * shifted).sum(-1) / total,
            z.mean(-1),
            jnp.log((exp * exp).sum(-1)) - 2 * lse,
            (pick(raw) >= raw.max(-1)).astype(jnp.float32),  # before the division, whose rounding differs by fusion
            top + lse,
        )
        return tuple(put(out, values, i, width) for out, values in zip(outputs, new, strict=True))

    zeros = tuple(jnp.zeros(sorted_targets.shape, jnp.float32) for _ in range(6))
    *sorted_stats, log_normaliser = jax.lax.fori_loop(0, count, body, zeros)
    stats = tuple(jnp.where(scored, restore(s, order), 0) for s in sorted_stats)
    sorted_entropy = sorted_stats[1]
    return stats, (sorted_hidden, weight, bias, sorted_targets, scored, order, count, log_normaliser, sorted_entropy)


def _backward(static, residuals, cotangents):
    sorted_hidden, weight, bias, sorted_targets, scored, order, count, log_normaliser, entropy = residuals
    width, temperature, scale, _ = static
    table = weight.astype(sorted_hidden.dtype)
    d_logps, d_entropy = (permute(jnp.where(scored, c, 0), order, width) for c in cotangents[:2])

    def body(i, grads):
        h, y, c, d, lse, ent = (
            take(x, i, width)[:, None] if x.ndim == 2 else take(x, i, width)
            for x in (sorted_hidden, sorted_targets, d_logps, d_entropy, log_normaliser, entropy)
        )
        _, z, capped = _scores(static, h, table, bias)
        logp = z - lse
        hit = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) == y
        dz = jnp.where(hit, c, 0) - jnp.exp(logp) * (c + d * (logp + ent))
        return add_gradients(grads, i, width, dz, capped, h, table, scale / temperature)

    start = zero_gradients(sorted_hidden, weight, bias)
    grads = jax.lax.fori_loop(0, count, body, start)
    return *finished_gradients(grads, order, weight, bias), None, None


_chunked.defvjp(_forward, _backward)


def _scores(static, h, table, bias):
    """As `products`, the logits over temperature."""
    _, temperature, scale, soft_cap = static
    raw, z, capped = products(h, table, bias, scale, soft_cap)
    return raw, z / temperature, capped
