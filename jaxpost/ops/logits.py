"""Any function of logits, position by position, without ever holding [B, T, V]: what compares whole distributions."""

import functools
from collections.abc import Callable
from typing import Any

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
from jaxpost.ops.logprobs import Head
from jaxpost.types import Array, Rows


def map_rows(
    fn: Callable[[Array, tuple[Array, ...], Any], tuple[Array, ...]],
    hidden: Array,
    head: Head,
    rows: Rows,
    said: tuple[Array, ...] = (),
    constants: Any = (),
    *,
    chunk: int = 1024,
) -> tuple[Array, ...]:
    """[B, T, ...] each, aligned with `rows.tokens` as targets: `map_logits` where `rows.weights` is not 0.

    hidden [B, T, D] and `said` [B, T, ...] at t are of the token at t + 1. fn is given (target, *said) for `aligned`.
    """
    later = lambda x: jnp.roll(x, -1, axis=1)  # noqa: E731
    scored = later(rows.weights != 0).at[:, -1].set(False)
    values = map_logits(fn, hidden, head, scored, (later(rows.tokens), *said), constants, chunk=chunk)
    return tuple(jnp.roll(x, 1, axis=1) for x in values)  # the last position is unscored, so 0 comes in front


def map_logits(
    fn: Callable[[Array, tuple[Array, ...], Any], tuple[Array, ...]],
    hidden: Array,
    head: Head,
    scored: Array,
    aligned: tuple[Array, ...] = (),
    constants: Any = (),
    *,
    chunk: int = 1024,
) -> tuple[Array, ...]:
    """[B, T, ...] each: what `fn` makes of the logits of every scored position, 0 elsewhere.

    Args:
      fn: (logits f32[N, V], `aligned` at the same positions [N, ...], `constants`) -> values [N, ...], any number of
        them (of whole numbers too, where no gradient is asked for). It is called again in the backward pass, and
        differentiated by the logits; it closes over no arrays.
      hidden: [B, T, D]. head: the unembedding. Gradients go to these two alone.
      scored: bool[B, T], the positions asked for.
      aligned: arrays [B, T, ...] that belong to the positions (targets, what a teacher says of them).
      constants: a tree of arrays that all positions share (a teacher's head).
      chunk: positions (over all rows) whose logits are held at once.
    """
    width = max(1, min(chunk // hidden.shape[0], hidden.shape[1]))
    aligned, constants = jax.lax.stop_gradient((aligned, constants))
    return _mapped((fn, width, head.scale, head.soft_cap), hidden, head.weight, head.bias, scored, aligned, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mapped(static, hidden, weight, bias, scored, aligned, constants):
    return _forward(static, hidden, weight, bias, scored, aligned, constants)[0]


def _forward(static, hidden, weight, bias, scored, aligned, constants):
    fn, width, scale, soft_cap = static
    order, count = plan(scored, width)

    def blank(x):  # zeros where not asked for: a chunk may hold such positions of a shorter row
        return jnp.where(scored.reshape(scored.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))

    sorted_hidden, *sorted_aligned = (permute(blank(x), order, width) for x in (hidden, *aligned))
    table = weight.astype(hidden.dtype)

    def values(i):
        h, parts = take(sorted_hidden, i, width), tuple(take(x, i, width) for x in sorted_aligned)
        return fn(products(h, table, bias, scale, soft_cap)[1], parts, constants)

    def body(i, outputs):
        return tuple(put(out, value, i, width) for out, value in zip(outputs, values(i), strict=True))

    start = tuple(jnp.zeros((*sorted_hidden.shape[:2], *x.shape[1:]), x.dtype) for x in jax.eval_shape(values, 0))
    found = jax.lax.fori_loop(0, count, body, start)
    residuals = sorted_hidden, weight, bias, scored, tuple(sorted_aligned), constants, order, count
    return tuple(blank(restore(x, order)) for x in found), residuals


def _backward(static, residuals, cotangents):
    fn, width, scale, soft_cap = static
    sorted_hidden, weight, bias, scored, sorted_aligned, constants, order, count = residuals
    table = weight.astype(sorted_hidden.dtype)
    sorted_cotangents = [permute(jnp.where(scored, c, 0), order, width) for c in cotangents]

    def body(i, grads):
        h, parts = take(sorted_hidden, i, width), tuple(take(x, i, width) for x in sorted_aligned)
        _, z, capped = products(h, table, bias, scale, soft_cap)
        _, pull = jax.vjp(lambda z: fn(z, parts, constants), z)
        (dz,) = pull(tuple(take(c, i, width) for c in sorted_cotangents))
        return add_gradients(grads, i, width, dz, capped, h, table, scale)

    grads = jax.lax.fori_loop(0, count, body, zero_gradients(sorted_hidden, weight, bias))
    return *finished_gradients(grads, order, weight, bias), None, None, None


_mapped.defvjp(_forward, _backward)
