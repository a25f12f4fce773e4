"""Objectives: what a step minimises, from a policy and a loss of `jaxpost.losses`."""

import functools
import inspect

import jax
import jax.numpy as jnp

from jaxpost.errors import ConfigError
from jaxpost.losses import preference
from jaxpost.losses.pairs import PairLogps, implicit_rewards, ld_weights, means, with_divergence, wpo_weights
from jaxpost.ops.completions import at_tokens, completion_sums, token_index
from jaxpost.ops.experts import balance_loss, expert_load
from jaxpost.schema import imported
from jaxpost.sharding import batch_shards, platform
from jaxpost.types import Batch, Mean, Term

CHOSEN, REJECTED = 0, 1  # branches of a pair, in this order
CHUNK_TOKENS = {"cpu": 256}  # positions whose logits each shard of the batch holds at once; docs/performance.md
DEFAULT_CHUNK_TOKENS = 1024


def bind_losses(settings, known: dict) -> dict:
    """{name: (weight, loss)} of the losses `settings.name` (of `known`, or dotted paths `pkg.mod:fn`), added with
    `settings.weights`. Each hyperparameter is bound to every loss that takes it; one that is None is as not given.

    Raises ConfigError, by key, for a name that is not there and a hyperparameter that no loss takes, one needs, or that
    is of another type than its default.
    """
    names, losses = settings.name, {}
    given = {name: value for name, value in settings.hyperparameters.items() if value is not None}
    for name in names:
        loss = imported("loss.name", name) if ":" in name else known.get(name)
        if loss is None:
            raise ConfigError(f"loss.name: no loss {name!r}; there are {', '.join(known)}, or give pkg.mod:fn")
        losses[name] = loss
    takes = {name: _keyword_only(loss) for name, loss in losses.items()}
    for name in given:
        if not any(name in parameters for parameters in takes.values()):
            every = sorted({parameter for parameters in takes.values() for parameter in parameters})
            raise ConfigError(
                f"loss.{name}: {' and '.join(names)} takes {', '.join(every) or 'no hyperparameters'}; set None"
            )
    bound = {}
    for (name, loss), weight in zip(losses.items(), settings.weights or (1.0,) * len(names), strict=True):
        for key, parameter in takes[name].items():
            _check_hyperparameter(f"loss.{key}", name, parameter, given)
        bound[name] = weight, functools.partial(loss, **{k: v for k, v in given.items() if k in takes[name]})
    return bound


def bind_loss(settings, known: dict):
    """As `bind_losses`, of a stage whose loss is no sum of several."""
    if len(settings.name) > 1 or settings.weights is not None:
        raise ConfigError(f"loss.name: expected one loss without a weight, got {', '.join(settings.name)}")
    ((_, loss),) = bind_losses(settings, known).values()
    return loss


def preference_losses(settings) -> dict:
    """`bind_losses` of pairs. Raises ConfigError where a loss is not defined for `settings.divergence`."""
    losses = bind_losses(settings, preference.LOSSES)
    traits = {name: preference.traits_of(loss) for name, (_, loss) in losses.items()}
    reading = {name: t for name, t in traits.items() if t.reads_reference} or traits
    unfit = [name for name, t in reading.items() if not t.any_divergence]
    if settings.divergence != "reverse_kl" and unfit:
        fitting = ", ".join(name for name, loss in preference.LOSSES.items() if loss.traits.any_divergence)
        raise ConfigError(f"loss.divergence: {settings.divergence}, but {unfit[0]} knows none; {fitting} do")
    return losses


def hyperparameter(loss, name: str, default=None):
    """The value that a bound loss was given, or its own default; `default` where it takes none of that name."""
    parameter = inspect.signature(loss).parameters.get(name)
    return default if parameter is None else parameter.default


def _keyword_only(loss) -> dict[str, inspect.Parameter]:
    return {p.name: p for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY}


def _check_hyperparameter(key: str, loss: str, parameter: inspect.Parameter, given) -> None:
    default, none = parameter.default, parameter.empty
    if parameter.name not in given:
        if default is none:
            raise ConfigError(f"{key}: missing; {loss} needs it")
        return
    value = given[parameter.name]
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)  # noqa: E731
    for kind, is_one in (("a number", number), ("True or False", lambda x: isinstance(x, bool))):
        if is_one(default) and not is_one(value):
            raise ConfigError(f"{key}: expected {kind}, got {value!r}")


def logits_chunk(mesh) -> int:
    """Positions over all rows whose logits are held at once: as many on each shard of the batch as suit the backend."""
    return CHUNK_TOKENS.get(platform(mesh), DEFAULT_CHUNK_TOKENS) * batch_shards(mesh)


def sft_objective(policy, loss, *, chunk: int):
    """Mean over trained tokens of `loss(logps) * weight` (`losses.sft`). frozen and carry are not read."""

    def objective(params, frozen, carry, batch: Batch, key):
        rows = batch.rows
        stats, terms, metrics = forward(policy, params, batch, chunk=chunk, key=key)
        term = Mean((loss(stats.logps) * rows.weights).sum(), rows.weights.sum())
        return {"nll": Term(1.0, term), **terms}, metrics

    return objective


def cached_reference(frozen, carry, batch: Batch):
    """f32[B, T]: reference log-probabilities that come with the batch."""
    return batch.token["reference_logps"]


def preference_objective(
    policy,
    losses: dict,
    *,
    chunk: int,
    reference_logps=cached_reference,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    ld_alpha: float = 1.0,
    wpo: bool = False,
):
    """Sum of weight * mean over pairs of `loss(policy, reference)` (`losses.preference`, hyperparameters bound).

    losses: {name: (weight, loss)}; the first one's beta and mean are those of the logged rewards.
    reference_logps: as `Reference.logps` (train/reference.py); not called where no loss reads them.
    The rest: what is done to the log-probabilities before (`losses.pairs`).
    """
    first = next(iter(losses.values()))[1]
    beta, mean_rewards = hyperparameter(first, "beta", 1.0), preference.traits_of(first).mean_rewards
    reads_reference = any(preference.traits_of(loss).reads_reference for _, loss in losses.values())

    def objective(params, frozen, carry, batch: Batch, key):
        mask = batch.completion["mask"]
        stats, terms, metrics = forward(policy, params, batch, chunk=chunk, key=key)
        policy_pairs, reference_pairs = pairs(stats.logps, batch, ld_alpha), None
        if reads_reference:
            theirs = jax.lax.stop_gradient(reference_logps(frozen, carry, batch))
            reference_pairs = pairs(theirs, batch, ld_alpha)
        valid = (mask[..., CHOSEN] * mask[..., REJECTED]).reshape(-1)
        likely = jnp.ones_like(valid)
        if wpo:
            likely = wpo_weights(pairs(stats.logps, batch), pairs(stats.log_sum_sq_probs, batch))
        for name, (weight, loss) in losses.items():
            traits, given = preference.traits_of(loss), (policy_pairs, reference_pairs)
            if traits.any_divergence and divergence != "reverse_kl":
                given = with_divergence(*given, divergence=divergence, alpha=divergence_alpha), None
            counts = valid * policy_pairs.chosen_tokens if traits.per_token else valid
            values = jnp.where(counts > 0, loss(*given) * likely, 0.0)
            terms[name] = Term(weight, Mean((values * counts).sum(), counts.sum()))
        rewards = implicit_rewards(policy_pairs, reference_pairs, beta=beta)
        rewards = means(policy_pairs, *rewards) if mean_rewards else rewards
        metrics |= jax.lax.stop_gradient(pair_metrics(policy_pairs, rewards, valid))
        return terms, metrics

    return objective


def token_logps_of(policy, params, batch: Batch, *, chunk: int):
    """f32[B, T]: log-probability of each trained token."""
    return policy.token_stats(params, batch, chunk=chunk)[0].logps


def forward(policy, params, batch: Batch, *, chunk: int, key):
    """What objectives of words begin with: (TokenStats of the rows, terms of the model itself, metrics of both)."""
    stats, router = policy.token_stats(params, batch, chunk=chunk, key=key)
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


def pairs(values, batch: Batch, ld_alpha: float = 1.0) -> PairLogps:
    """Sums of values [B, T] over the trained tokens of each completion, as P = B * M pairs.

    ld_alpha: what a token beyond the shorter of the two completions counts (LD-DPO).
    """
    rows, (documents, branches) = batch.rows, batch.completion["mask"].shape[1:]
    scored = (rows.weights != 0).astype(jnp.float32)
    tokens = completion_sums(scored, rows, documents, branches)
    weights = scored
    if ld_alpha != 1:
        shorter = at_tokens(jnp.broadcast_to(tokens.min(-1, keepdims=True), tokens.shape), rows)
        index = token_index(scored, rows, documents, branches)
        weights = scored * ld_weights(index, shorter, shorter, alpha=ld_alpha)
    flat = lambda x: [x[..., branch].reshape(-1) for branch in (CHOSEN, REJECTED)]  # noqa: E731
    margin = None
    if "score" in batch.completion:
        chosen, rejected = flat(batch.completion["score"])
        margin = chosen - rejected
    sums = completion_sums(values * weights, rows, documents, branches)
    return PairLogps(*flat(sums), *flat(tokens), margin)


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
