"""Objectives: what a step minimises, from a policy and a loss of `jaxpost.losses`."""

import functools
import inspect

import jax
import jax.numpy as jnp

from jaxpost.errors import ConfigError
from jaxpost.losses.preference import PairLogps, implicit_rewards
from jaxpost.ops.completions import completion_sums
from jaxpost.ops.experts import balance_loss, expert_load
from jaxpost.schema import imported
from jaxpost.sharding import batch_shards
from jaxpost.types import Batch, Mean, Term

CHOSEN, REJECTED = 0, 1  # branches of a pair, in this order
CHUNK_TOKENS = {"cpu": 256}  # positions whose logits each shard of the batch holds at once; docs/performance.md
DEFAULT_CHUNK_TOKENS = 1024


def bind_loss(settings, known: dict):
    """The loss `settings.name` (of `known`, or a dotted path `pkg.mod:fn`) with its hyperparameters bound.

    Raises ConfigError for a name that is not there and a hyperparameter that the loss does not take, by key.
    """
    loss = imported("loss.name", settings.name) if ":" in settings.name else known.get(settings.name)
    if loss is None:
        raise ConfigError(f"loss.name: no loss {settings.name!r}; there are {', '.join(known)}, or give pkg.mod:fn")
    takes = {p.name: p for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in settings.hyperparameters:
        if name not in takes:
            raise ConfigError(f"loss.{name}: {settings.name} takes {', '.join(takes) or 'no hyperparameters'}")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in settings.hyperparameters:
            raise ConfigError(f"loss.{name}: missing; {settings.name} needs it")
    return functools.partial(loss, **settings.hyperparameters)


def logits_chunk(mesh) -> int:
    """Positions over all rows whose logits are held at once: as many on each shard of the batch as suit the backend."""
    return CHUNK_TOKENS.get(jax.default_backend(), DEFAULT_CHUNK_TOKENS) * batch_shards(mesh)


def sft_objective(policy, loss, *, chunk: int):
    """Mean over trained tokens of `loss(logps) * weight` (`losses.sft`). frozen and carry are not read."""

    def objective(params, frozen, carry, batch: Batch, key):
        rows = batch.rows
        stats, terms, metrics = forward(policy, params, batch, chunk=chunk)
        term = Mean((loss(stats.logps) * rows.weights).sum(), rows.weights.sum())
        return {"nll": Term(1.0, term), **terms}, metrics

    return objective


def cached_reference(frozen, carry, batch: Batch):
    """f32[B, T]: reference log-probabilities that come with the batch."""
    return batch.token["reference_logps"]


def preference_objective(policy, loss, *, beta: float, chunk: int, reference_logps=cached_reference):
    """Mean over pairs of `loss(policy, reference)` (`losses.preference`, hyperparameters bound).

    reference_logps: as `Reference.logps` (train/reference.py). beta: for the logged rewards.
    """

    def objective(params, frozen, carry, batch: Batch, key):
        mask = batch.completion["mask"]
        stats, terms, metrics = forward(policy, params, batch, chunk=chunk)
        policy_pairs = pairs(stats.logps, batch)
        reference_pairs = pairs(jax.lax.stop_gradient(reference_logps(frozen, carry, batch)), batch)
        valid = (mask[..., CHOSEN] * mask[..., REJECTED]).reshape(-1)
        term = Mean((loss(policy_pairs, reference_pairs) * valid).sum(), valid.sum())
        rewards = implicit_rewards(policy_pairs, reference_pairs, beta=beta)
        metrics |= jax.lax.stop_gradient(pair_metrics(policy_pairs, rewards, valid))
        return {"preference": Term(1.0, term), **terms}, metrics

    return objective


def token_logps_of(policy, params, batch: Batch, *, chunk: int):
    """f32[B, T]: log-probability of each trained token."""
    return policy.token_stats(params, batch, chunk=chunk)[0].logps


def forward(policy, params, batch: Batch, *, chunk: int):
    """What objectives of words begin with: (TokenStats of the rows, terms of the model itself, metrics of both)."""
    stats, router = policy.token_stats(params, batch, chunk=chunk)
    terms, metrics = expert_terms(policy, router, batch.rows)
    return stats, terms, jax.lax.stop_gradient(token_metrics(stats, batch.rows) | metrics)


def expert_terms(policy, router, rows) -> tuple[dict[str, Term], dict[str, Mean]]:
    """The load-balancing loss of the model's experts and its metrics, if it has any: a statistic of the microbatch."""
    if router is None:
        return {}, {}
    experts, mask = policy.config.experts, (rows.segments > 0).astype(jnp.float32)
    count = mask.sum()
    balance = balance_loss(router, experts.top_k, mask)
    busiest = expert_load(router, experts.top_k, mask).max() * (experts.count / experts.top_k)
    terms = {"router": Term(experts.loss_weight, Mean(balance * count, count))}
    return terms, {"router/max_load": Mean(busiest * count, count)}


def pairs(logps, batch: Batch) -> PairLogps:
    """Sums over the tokens of each completion, as P = B * M pairs."""
    documents, branches = batch.completion["mask"].shape[1:]
    scored = (batch.rows.weights != 0).astype(jnp.float32)
    sums = completion_sums(logps * scored, batch.rows, documents, branches)
    tokens = completion_sums(scored, batch.rows, documents, branches)
    flat = lambda x, branch: x[..., branch].reshape(-1)  # noqa: E731
    return PairLogps(flat(sums, CHOSEN), flat(sums, REJECTED), flat(tokens, CHOSEN), flat(tokens, REJECTED))


def pair_metrics(policy: PairLogps, rewards, valid) -> dict[str, Mean]:
    """The quantities that TRL logs for preference losses, under its names (a tie counts as wrong, as there)."""
    chosen, rejected = rewards
    count = valid.sum()
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    return {name: Mean((value * valid).sum(), count) for name, value in values.items()}


def token_metrics(stats, rows) -> dict[str, Mean]:
    """Means over trained tokens."""
    weights = rows.weights
    return {
        "mean_token_accuracy": Mean((stats.is_top1 * weights).sum(), weights.sum()),
        "entropy": Mean((stats.entropy * weights).sum(), weights.sum()),
    }
