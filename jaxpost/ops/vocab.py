"""Log-probabilities of tokens where the head's weight is split over devices: what each device computes, and sends.

`ops.logprobs` holds the whole weight and walks over positions. Here the vocabulary is walked over in parts: a part's
weight is gathered, used for all positions at hand, and forgotten; its gradient is reduced into its shards at once. So a
pass gathers the weight once, whatever the number of positions, and neither the whole weight nor the whole of its f32
gradient ever lies on a device. To be called under `jax.shard_map`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxpost.ops.chunks import permute, plan, products, put, restore, take
from jaxpost.types import Array

PART = 1 << 24  # entries of the weight that are gathered at once
NONE = -1e30  # below every logit


@dataclasses.dataclass(frozen=True)
class Vocab:
    """The head, but for its weight, and the mesh axes that its weight [V, D] and the positions are split over."""

    size: int  # V
    temperature: float
    scale: float
    soft_cap: float | None
    width: int  # positions whose logits are held at once
    over_dim: str | None  # D
    over_words: str | None  # V
    over_positions: tuple[str, ...]  # besides over_dim, whose devices hold different positions too

    def parts(self, weight: Array) -> tuple[int, int]:
        """(parts, words of each) of a shard [v, d]: few enough words at once, if need be with empty ones at the end."""
        words, dim = weight.shape[0], weight.shape[1] * (jax.lax.axis_size(self.over_dim) if self.over_dim else 1)
        fewest = -(-words * dim // PART)
        even = [n for n in range(fewest, 2 * fewest) if words % n == 0 and words // n % 8 == 0]
        parts = even[0] if even else fewest
        return parts, -(-words // parts)

    def cut(self, weight: Array) -> tuple[Array, Array, int]:
        """(the shard in its parts [n, v / n, d], the first word of each, words that the shard holds)."""
        n, words = self.parts(weight)
        held = weight.shape[0]
        cut = jnp.pad(weight, ((0, n * words - held), (0, 0))).reshape(n, words, -1)
        return cut, jnp.arange(n, dtype=jnp.int32) * words, held

    def table(self, part: Array, dtype) -> Array:
        part = part.astype(dtype)
        return jax.lax.all_gather(part, self.over_dim, axis=1, tiled=True) if self.over_dim else part

    def logits(self, hidden: Array, table: Array, first: Array, held: int):
        """(f32[n, v] products, logits over temperature, tanh of the cap, bool[1, v] where there is a word)."""
        raw, z, capped = products(hidden, table, None, self.scale, self.soft_cap)
        real = (first + jnp.arange(len(table), dtype=jnp.int32) < held)[None]
        return jnp.where(real, raw, NONE), jnp.where(real, z / self.temperature, NONE), capped, real

    def here(self, targets: Array, first: Array, words: int, held: int):
        """(index into a part of `words` words, bool: whether it is there) of targets."""
        own = targets - (jax.lax.axis_index(self.over_words) * held if self.over_words else 0)
        index = own - first
        return jnp.clip(index, 0, words - 1), (index >= 0) & (index < words) & (own < held)


def forward(vocab: Vocab, hidden: Array, weight: Array, targets: Array, scored: Array):
    """((logps, entropy, mean_logit, log_sum_sq_probs, is_top1), log normaliser), f32[b, t] each, of this device's rows.

    hidden [b, t, D], weight [v, d], targets int32[b, t], scored bool[b, t]; see `ops.logprobs.token_logps`.
    """
    order, count, (h, y) = _sorted(vocab, scored, hidden, targets)
    cut, firsts, held = vocab.cut(weight)

    def part(found, one):
        first, table = one[1], vocab.table(one[0], hidden.dtype)

        def body(i, found):
            new = _seen(vocab, take(h, i, vocab.width), take(y, i, vocab.width), table, first, held)
            old = tuple(take(x, i, vocab.width) for x in found)
            return tuple(put(x, value, i, vocab.width) for x, value in zip(found, _merged(old, new), strict=True))

        return jax.lax.fori_loop(0, count, body, found), None

    zero, none = jnp.zeros(y.shape, jnp.float32), jnp.full(y.shape, NONE, jnp.float32)
    found, _ = jax.lax.scan(part, (none, zero, zero, zero, zero, zero, zero, none), (cut, firsts))
    if vocab.over_words:
        found = _over_shards(found, vocab.over_words)
    top, total, moment, squares, sum_z, picked, raw_picked, raw_top = (
        restore(x, order).reshape(scored.shape) for x in found
    )
    lse = jnp.log(jnp.where(scored, total, 1))
    stats = (
        picked - top - lse,
        lse - moment / jnp.where(scored, total, 1),
        sum_z / vocab.size,
        jnp.log(jnp.where(scored, squares, 1)) - 2 * lse,
        (raw_picked >= raw_top).astype(jnp.float32),
    )
    return tuple(jnp.where(scored, x, 0) for x in stats), jnp.where(scored, top + lse, 0)


def backward(vocab: Vocab, hidden, weight, targets, scored, log_normaliser, entropy, d_logps, d_entropy):
    """(gradient of hidden [b, t, D], of this device's shard of the weight [v, d], over all devices)."""
    parts = (hidden, targets, log_normaliser, entropy, d_logps, d_entropy)
    order, count, (h, *per_position) = _sorted(vocab, scored, *parts)
    cut, firsts, held = vocab.cut(weight)

    def part(d_hidden, one):
        first, table = one[1], vocab.table(one[0], hidden.dtype)

        def body(i, grads):
            d_hidden, d_table = grads
            states = take(h, i, vocab.width)
            y, lse, ent, c, d = (take(x, i, vocab.width)[:, None] for x in per_position)
            _, z, capped, _ = vocab.logits(states, table, first, held)
            index, there = vocab.here(y, first, len(table), held)
            hit = (jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) == index) & there
            logp = z - lse
            dz = jnp.where(hit, c, 0) - jnp.exp(logp) * (c + d * (logp + ent))
            if capped is not None:
                dz = dz * (1 - capped * capped)
            dz = (dz * (vocab.scale / vocab.temperature)).astype(table.dtype)
            d_table = d_table + jnp.einsum("nv,nd->vd", dz, states, preferred_element_type=jnp.float32)
            d_states = jnp.einsum("nv,vd->nd", dz, table, preferred_element_type=jnp.float32)
            return put(d_hidden, take(d_hidden, i, vocab.width) + d_states, i, vocab.width), d_table

        d_hidden, d_part = jax.lax.fori_loop(0, count, body, (d_hidden, jnp.zeros(table.shape, jnp.float32)))
        if vocab.over_dim:  # as an exchange: the TPU compiler makes an all-reduce of a scatter, twice the bytes
            d_part = d_part.astype(weight.dtype).reshape(len(table), -1, weight.shape[1])
            d_part = jax.lax.all_to_all(d_part, vocab.over_dim, split_axis=1, concat_axis=1, tiled=True)
            d_part = d_part.astype(jnp.float32).sum(1)
        d_part = d_part.astype(weight.dtype)
        d_part = jax.lax.psum(d_part, vocab.over_positions) if vocab.over_positions else d_part
        # Else the type in which the optimizer reads it moves into the loop: twice the memory until then.
        return d_hidden, jax.lax.optimization_barrier(d_part)

    d_hidden, d_cut = jax.lax.scan(part, jnp.zeros(h.shape, jnp.float32), (cut, firsts))
    if vocab.over_words:
        d_hidden = jax.lax.psum(d_hidden, vocab.over_words)
    d_hidden = restore(d_hidden, order).reshape(hidden.shape).astype(hidden.dtype)
    return d_hidden, d_cut.reshape(-1, weight.shape[1])[: len(weight)]


def _sorted(vocab, scored, *arrays):
    """(order, chunks that hold any, the arrays [1, N, ...] with the scored positions first, 0 where not scored)."""
    order, count = plan(scored.reshape(1, -1), vocab.width)
    blank = lambda x: jnp.where(scored.reshape(scored.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))  # noqa: E731
    flat = [blank(x).reshape(1, -1, *x.shape[2:]) for x in arrays]
    return order, count, [permute(x, order, vocab.width) for x in flat]


def _seen(vocab, hidden, targets, table, first, held):
    """What one part of the vocabulary says of n positions: the eight running values of `_merged`, f32[n] each."""
    raw, z, _, real = vocab.logits(hidden, table, first, held)
    index, there = vocab.here(targets, first, len(table), held)
    pick = lambda x: jnp.where(there, jnp.take_along_axis(x, index[:, None], axis=1)[:, 0], 0)  # noqa: E731
    top = z.max(1)
    shifted = z - top[:, None]
    exp = jnp.exp(shifted)
    sums = exp.sum(1), (exp * shifted).sum(1), (exp * exp).sum(1), jnp.where(real, z, 0).sum(1)
    return top, *sums, pick(z), pick(raw), raw.max(1)


def _merged(a, b):
    """Running values of two parts as those of both: log-sum-exp with its first moment and its squares.

    (largest logit m, sum of e^(z-m), of e^(z-m) (z-m), of e^2(z-m), of z, target's z, its product, largest product)
    """
    top = jnp.maximum(a[0], b[0])
    (s, m, q), (s_b, m_b, q_b) = _moved(a, top), _moved(b, top)
    return top, s + s_b, m + m_b, q + q_b, a[4] + b[4], a[5] + b[5], a[6] + b[6], jnp.maximum(a[7], b[7])


def _moved(values, top):
    shift, s, m, q = values[0] - top, *values[1:4]
    factor = jnp.exp(shift)
    return factor * s, factor * (m + shift * s), factor * factor * q


def _over_shards(found, axis):
    top = jax.lax.pmax(found[0], axis)
    sums = jax.lax.psum((*_moved(found, top), *found[4:7]), axis)
    return top, *sums, jax.lax.pmax(found[7], axis)
