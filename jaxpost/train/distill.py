"""Distillation: the objective, and what it is told by a teacher, live or stored."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.losses import distill
from jaxpost.ops.logits import map_rows
from jaxpost.ops.logprobs import Head, logits
from jaxpost.train.objectives import expert_terms, token_metrics
from jaxpost.types import Array, Batch, Mean, Term

IDS, LOGPS = "teacher_ids", "teacher_logps"  # of Batch.token, [B, T, k] each: the likeliest first


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What the objective asks of a teacher.

    said: (frozen, batch) -> (arrays [B, T, ...] that at t tell of the token at t + 1, a tree that all positions share).
    pair: (the student's logits f32[N, V], what was said at these positions, the tree) -> log-probabilities of student
      and teacher over the same events, f32[N, V or k + 1] each.
    frozen: parameters that `said` reads.
    """

    said: Callable[[Any, Batch], tuple[tuple[Array, ...], Any]]
    pair: Callable[[Array, tuple[Array, ...], Any], tuple[Array, Array]]
    frozen: dict[str, Any] | None = None


class Compared(NamedTuple):
    """Of every trained token, f32[B, T]. Only the first two carry gradients."""

    divergence: Array
    logps: Array
    entropy: Array
    is_top1: Array


def distill_objective(policy, loss, teacher: Teacher, *, nll_weight: float, chunk: int):
    """Mean over trained tokens of `loss(student, teacher)` (`losses.distill`), plus nll_weight times that of -log p.

    The divergence is as it stands: with a temperature its gradient is smaller by about temperature^2.
    """

    def compare(student, parts, constants):
        targets, *said = parts
        logps = jax.nn.log_softmax(student)
        of_target = jnp.take_along_axis(logps, targets[:, None], axis=-1)[:, 0]
        constant = jax.lax.stop_gradient(logps)
        entropy = -(jnp.exp(constant) * constant).sum(-1)
        is_top1 = (jax.lax.stop_gradient(of_target) >= constant.max(-1)).astype(jnp.float32)
        if not nll_weight:
            of_target = jax.lax.stop_gradient(of_target)
        return loss(*teacher.pair(student, tuple(said), constants)), of_target, entropy, is_top1

    def objective(params, frozen, carry, batch: Batch, key):
        rows = batch.rows
        hidden, router = policy.hidden(params, rows, key)
        said, constants = jax.lax.stop_gradient(teacher.said(frozen, batch))
        compared = Compared(*map_rows(compare, hidden, policy.head(params), rows, said, constants, chunk=chunk))
        terms, metrics = expert_terms(policy, router, rows)
        mean = lambda values: Mean((values * rows.weights).sum(), rows.weights.sum())  # noqa: E731
        divergence, nll = mean(compared.divergence), mean(-compared.logps)
        metrics |= token_metrics(compared, rows) | {"nll": nll, "divergence": divergence}
        terms |= {"divergence": Term(1.0, divergence)} | ({"nll": Term(nll_weight, nll)} if nll_weight else {})
        return terms, jax.lax.stop_gradient(metrics)

    return objective


# ---- live ----


def live_teacher(policy, params, *, temperature: float, top_k: int | None) -> Teacher:
    """A model in `frozen`, over the tokens that it shares with the student: all, or its k likeliest and the rest."""

    def said(frozen, batch: Batch):
        hidden, _ = policy.hidden(frozen["teacher"], batch.rows)
        return (hidden,), policy.head(frozen["teacher"])

    pair = functools.partial(live_pair, temperature=temperature, top_k=top_k)
    return Teacher(said, pair, {"teacher": params})


def live_pair(student, said, head: Head, *, temperature: float, top_k: int | None):
    """As `Teacher.pair`. said: (hidden states of the teacher,)."""
    (hidden,) = said
    teacher = teacher_logps(logits(hidden, head), student.shape[1], temperature)
    if top_k is not None:
        logps, ids = jax.lax.top_k(teacher, top_k)
        return stored_pair(student, (ids, logps), teacher.shape[1], temperature=temperature)
    return distill.logps(student[:, : teacher.shape[1]], temperature=temperature), teacher


def teacher_logps(z, vocab_size: int, temperature: float):
    """Log-probabilities over the first `vocab_size` tokens of logits [N, V]; more rows than words are padding."""
    return distill.logps(z[:, :vocab_size], temperature=temperature)


# ---- stored ----


def stored_teacher(vocab_size: int, *, temperature: float, top_k: int | None) -> Teacher:
    """What `likeliest` gave, out of the batch. vocab_size: the tokens over which it is a distribution."""

    def said(frozen, batch: Batch):
        later = lambda name: jnp.roll(batch.token[name], -1, axis=1)[..., :top_k]  # noqa: E731
        return (later(IDS), later(LOGPS)), ()

    def pair(student, said, constants):
        return stored_pair(student, said, vocab_size, temperature=temperature)

    return Teacher(said, pair)


def stored_pair(student, said, vocab_size: int, *, temperature: float):
    """As `Teacher.pair`. said: (ids int32[N, k] of the teacher's likeliest tokens, their log-probabilities)."""
    ids, teacher = said
    student = distill.logps(student[:, :vocab_size], temperature=temperature)
    return distill.with_rest(jnp.take_along_axis(student, ids, axis=-1)), distill.with_rest(teacher)


def likeliest(policy, params, batch: Batch, *, vocab_size: int, temperature: float, top_k: int, chunk: int):
    """(ids int32, log-probabilities f32), [B, T, k] each: the teacher's likeliest tokens, where tokens are trained."""
    hidden, _ = policy.hidden(params, batch.rows)

    def top(z, parts, constants):
        logps, ids = jax.lax.top_k(teacher_logps(z, vocab_size, temperature), top_k)
        return ids, logps

    return map_rows(top, hidden, policy.head(params), batch.rows, chunk=chunk)
