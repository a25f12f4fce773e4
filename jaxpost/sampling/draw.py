"""One token out of logits: what may be drawn, with what probability, and the draw. Pure; arrays [C, V] and [C]."""

import jax
import jax.numpy as jnp

from jaxpost.types import Array

BLOCK = 128  # tokens in the last of the two levels in which one is found


def penalised(logits: Array, seen: Array, penalty: Array) -> Array:
    """Logits of the tokens that were seen (bool[C, V]) over `penalty`, or times it where they are below 0.

    Keskar et al. 2019, "CTRL", arXiv:1909.05858, section 4.1, with the sign taken into account as everywhere since.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: Array, k: Array) -> Array:
    """Keeps the k likeliest, others are -inf. Those as likely as the k-th all stay."""
    return _at_least(logits, _threshold(logits, jnp.isfinite(logits).astype(jnp.float32), k.astype(jnp.float32)))


def top_p(logits: Array, p: Array) -> Array:
    """Keeps the fewest likeliest whose probabilities sum to at least p (Holtzman et al. 2020, arXiv:1904.09751)."""
    probs = jax.nn.softmax(logits, axis=-1)
    return _at_least(
        logits, _threshold(logits, probs, jnp.minimum(p, probs.sum(-1)))
    )  # all of them may sum to less than 1


def min_p(logits: Array, p: Array) -> Array:
    """Keeps those at least p times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    return _at_least(logits, logits.max(axis=-1) + jnp.log(p))


def likeliest(logits: Array) -> Array:
    """int32[C]: the first of the highest. (jnp.argmax of the whole row is scalar code on CPU, a maximum is not.)"""
    blocks = _blocks(logits, -jnp.inf)
    block = jnp.argmax(blocks.max(-1), axis=-1)
    return (block * BLOCK + jnp.argmax(_of_block(blocks, block), axis=-1)).astype(jnp.int32)


def draw(logits: Array, uniform: Array) -> tuple[Array, Array]:
    """(int32[C] tokens, f32[C] their log-probabilities) of softmax(logits), by inversion of its distribution function.

    uniform: f32[C] in [0, 1). One number a row in place of one a token: the cost is that of the softmax. Sums are of
    blocks of 128 and then within one, in f32, so probabilities are right to about 1e-7.
    """
    highest = logits.max(axis=-1, keepdims=True)
    weights = _blocks(jnp.exp(logits - highest), 0)
    sums = jnp.cumsum(weights.sum(-1), axis=-1)
    total = sums[:, -1]
    wanted = uniform * total
    block = _first_above(sums, wanted)
    before = jnp.where(block > 0, jnp.take_along_axis(sums, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    token = block * BLOCK + _first_above(jnp.cumsum(_of_block(weights, block), axis=-1), wanted - before)
    logp = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - highest[:, 0] - jnp.log(total)
    return token.astype(jnp.int32), logp


def _blocks(x: Array, fill: float) -> Array:
    """[C, V] in blocks [C, n, 128], the last of them filled up."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)), constant_values=fill).reshape(len(x), -1, BLOCK)


def _of_block(blocks: Array, block: Array) -> Array:
    """[C, 128]: of each row the block `block` [C]."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _first_above(sums: Array, wanted: Array) -> Array:
    """int32[C]: where sums [C, n] (not falling) first exceed `wanted`; by rounding nowhere: where they last rise."""
    above = sums > jnp.minimum(wanted[:, None], jnp.nextafter(sums[:, -1:], jnp.float32(-1)))
    return jnp.argmax(above, axis=-1)


def _at_least(logits: Array, threshold: Array) -> Array:
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def _threshold(logits: Array, weights: Array, wanted: Array) -> Array:
    """f32[C]: the highest t such that the weights [C, V] of the logits >= t sum to `wanted` or more.

    Found by bisection over the 2^32 floats in their order: 32 sums over the vocabulary, where sorting it is slow.
    """

    def halve(_, ends):
        low, high = ends  # the sum at low is enough, that at high is not
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = (weights * (logits >= _float(middle)[:, None])).sum(-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    least = _ordered(jnp.full(len(logits), -jnp.inf, jnp.float32))
    low, _ = jax.lax.fori_loop(0, 32, halve, (least, _ordered(logits.max(-1)) + 1))
    return _float(low)


def _ordered(x: Array) -> Array:
    """f32 -> int32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(ordered: Array) -> Array:
    return jax.lax.bitcast_convert_type(ordered ^ ((ordered >> 31) & 0x7FFFFFFF), jnp.float32)
