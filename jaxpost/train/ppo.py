"""Proximal policy optimisation on completions that were drawn: one program from their scores to the new weights.

Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593, Ouyang et al. 2022,
arXiv:2203.02155. docs/ppo.md lists the details of implementation, and which are left out.

Parameters are {"policy", "value"}; what it remembers (`carry`) is {"kl_coef", "scores": rl.rewards.Moments}.
A batch comes with `token["sampler_logps"]` and `["drawn_logps"]` (of `types.Completion`) and with
`completion["score"]`, `["scored"]` (0: it failed, and no token of it has weight) and `["ended"]` (1: by itself).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpost.losses import kl as kl_losses
from jaxpost.losses import policy as policy_losses
from jaxpost.losses import value as value_losses
from jaxpost.models.policy import Policy
from jaxpost.models.sharded import row_stats
from jaxpost.ops.completions import at_tokens, completion_sums
from jaxpost.ops.masked import continues, moments, whiten
from jaxpost.rl import controllers, rewards
from jaxpost.rl.advantages import gae
from jaxpost.sharding import constrain
from jaxpost.train.objectives import expert_terms, hyperparameter
from jaxpost.train.optimizer import Optimizer, make_optimizer
from jaxpost.train.step import make_train_step
from jaxpost.train.value import ValueModel
from jaxpost.types import Array, Batch, Mean, Rows, Term, TrainState

METRICS = (  # what a step logs of its update; train/online.py adds what any stage that samples does
    *("reward", "reward_std", "shaped_reward", "kl", "kl_per_token", "kl_coef", "value", "return"),
    *("explained_variance", "sampler_trainer_gap", "policy_drift", "first/ratio_error", "first/clip_fraction", "ratio"),
    *("clip_fraction", "value_clip_fraction", "update_kl", "importance_weight", "updates", "loss/policy", "loss/value"),
    *("loss/entropy", "loss/kl", "loss/router", "router/max_load", "grad_norm", "learning_rate", "skipped_steps"),
)


@dataclasses.dataclass(frozen=True)
class Ppo:
    """An algorithm, its models and its hyperparameters; pure functions of the parameters.

    loss: of `losses.policy`, bound. reference: of the KL; None: `frozen["base"]` under adapters. off_policy: the tokens
    were drawn from something else than the policy at the start of the update, and are weighed.
    """

    policy: Policy
    value: ValueModel
    reference: Policy | None
    loss: Callable
    config: Any
    chunk: int  # positions whose logits are held at once
    off_policy: bool

    def begin(self) -> dict:
        """The first carry."""
        return {"kl_coef": jnp.float32(self.config.kl.coef), "scores": rewards.Moments.none()}

    # 3. What policy, reference and value model say of every token that was drawn.

    def says(self, params, frozen, batch: Batch):
        """(TokenStats, values f32[B, T], router logits) of the policy and the value model."""
        whole = self.policy.whole(params["policy"], frozen)
        hidden, router = self.policy.hidden(whole, batch.rows)  # without dropout: its ratio to itself must be 1
        stats = self._stats(self.policy, whole, hidden, batch)
        return stats, self.value.values(params["value"], hidden, batch.rows), router

    def reference_logps(self, frozen, batch: Batch) -> Array:
        """f32[B, T]"""
        policy = self.reference or dataclasses.replace(self.policy, lora=None)
        params = frozen["base" if self.reference is None else "reference"]
        hidden, _ = policy.hidden(params, batch.rows)
        return self._stats(policy, params, hidden, batch).logps

    def _stats(self, policy, params, hidden, batch):
        temperature = self.config.sampling.temperature
        return row_stats(hidden, policy.head(params), batch.rows, temperature=temperature, chunk=self.chunk)

    # 4. Rewards and advantages.

    def estimate(self, carry, batch: Batch) -> tuple[Batch, dict, dict[str, Mean]]:
        """The batch with advantages and returns, the carry with its scores, and metrics.

        batch: with "old_logps", "old_values", "reference_logps" and "entropy" of its tokens.
        """
        c, rows, token, mask = self.config, batch.rows, batch.token, batch.rows.weights
        scored, raw = batch.completion["scored"], batch.completion["score"]
        lengths = completion_sums(mask, rows, *raw.shape[1:])
        carry = carry | {"scores": rewards.observe(carry["scores"], raw, scored)}
        scores = self.shaped(raw, batch.completion["ended"], lengths, carry["scores"])
        kl = kl_losses.KL_ESTIMATORS[c.kl.estimator](token["old_logps"], token["reference_logps"])
        coef = carry["kl_coef"] if c.kl.where == "reward" else 0.0
        given = rewards.token_rewards(at_tokens(scores, rows), kl, mask, kl_coef=coef)
        if c.ppo.whiten_rewards:
            given = whiten(given, mask, shift_mean=False)
        values = token["old_values"] * mask
        advantages, returns = gae(given, values, continues(mask), gamma=c.ppo.gamma, lam=c.ppo.lam)
        _, unexplained = moments(returns - values, mask)
        explained = 1 - unexplained / jnp.maximum(moments(returns, mask)[1], 1e-8)
        if c.ppo.whiten_advantages:
            advantages = whiten(advantages, mask)
        drawn_kl = kl_losses.k1(token["old_logps"], token["reference_logps"]) * mask
        gap = (jnp.abs(token["old_logps"] - token["sampler_logps"]) * mask).max()
        count, one = scored.sum(), jnp.float32(1)
        _, variance = moments(raw, scored)
        metrics = {
            "reward": Mean((raw * scored).sum(), count),
            "reward_std": Mean(jnp.sqrt(variance), one),
            "shaped_reward": Mean((scores * scored).sum(), count),
            "kl": Mean(drawn_kl.sum(), count),
            "kl_per_token": Mean(drawn_kl.sum(), mask.sum()),
            "kl_coef": Mean(carry["kl_coef"], one),
            "entropy": Mean((token["entropy"] * mask).sum(), mask.sum()),
            "value": Mean((values * mask).sum(), mask.sum()),
            "return": Mean((returns * mask).sum(), mask.sum()),
            "explained_variance": Mean(explained, one),
            "policy_drift" if c.rollout.staleness else "sampler_trainer_gap": Mean(gap, one),
        }
        return dataclasses.replace(batch, token=token | {"advantages": advantages, "returns": returns}), carry, metrics

    def shaped(self, scores: Array, ended: Array, lengths: Array, seen: rewards.Moments) -> Array:
        """[B, M, N]: normalised, clipped, then penalised."""
        c = self.config.score
        if c.normalize:
            scores = rewards.normalize(scores, seen)
        if c.clip is not None:
            scores = jnp.clip(scores, -c.clip, c.clip)
        scores = rewards.penalize_missing_eos(scores, ended, penalty=c.missing_eos_penalty, score=c.missing_eos_score)
        return rewards.penalize_length(scores, lengths, penalty=c.length_penalty, free_tokens=c.free_tokens)

    # 6. The update.

    def objective(self, params, frozen, carry, batch: Batch, key):
        """An objective (train/step.py) of one minibatch."""
        c, token, mask = self.config, batch.token, batch.rows.weights
        stats, values, router = self.says(params, frozen, batch)
        log_ratios, advantages = stats.logps - token["old_logps"], token["advantages"]
        losses = self.loss(log_ratios, advantages)
        weights = jnp.ones_like(losses)
        if self.off_policy:
            difference = token["old_logps"] - token["drawn_logps"]
            weights = policy_losses.importance_weights(difference, high=c.rollout.importance_high)
        limits = {"clip_range": c.value.clip_range}
        value_loss = value_losses.squared_error(values, token["old_values"], token["returns"], **limits)
        mean = functools.partial(policy_losses.token_mean, mask=mask)
        terms, metrics = expert_terms(self.policy, router, batch.rows)
        terms |= {"policy": Term(1.0, mean(losses * weights)), "value": Term(c.value.coef, mean(value_loss))}
        if c.ppo.entropy_coef:
            terms["entropy"] = Term(-c.ppo.entropy_coef, mean(stats.entropy))
        if c.kl.where == "loss":
            estimate = kl_losses.KL_ESTIMATORS[c.kl.estimator](stats.logps, token["reference_logps"])
            terms["kl"] = Term(carry["kl_coef"], mean(estimate))
        clips = {name: hyperparameter(self.loss, name) for name in ("epsilon_low", "epsilon_high", "dual_clip")}
        clipped = policy_losses.is_clipped(log_ratios, advantages, **clips)
        ratio = policy_losses.ratios(log_ratios)
        metrics |= {
            "ratio": mean(ratio),
            "ratio_error": Mean((jnp.abs(ratio - 1) * mask).max(), jnp.float32(1)),
            "clip_fraction": mean(clipped),
            "value_clip_fraction": mean(
                value_losses.is_clipped(values, token["old_values"], token["returns"], **limits)
            ),
            "update_kl": mean(kl_losses.k3(token["old_logps"], stats.logps)),
        }
        if self.off_policy:
            metrics["importance_weight"] = mean(weights)
        return terms, jax.lax.stop_gradient(metrics)


def make_learn(ppo: Ppo, optimizer, *, microbatches: int, observe) -> Callable:
    """`(state, frozen, batch) -> (state, {name: Mean})`: all that a step makes of its completions, as one program.

    microbatches: of each minibatch; their rows times these times `ppo.minibatches` are the rows of the batch. observe:
    see `make_train_step`. An update stops after the minibatch at which `update_kl` exceeds `ppo.target_kl`.
    """
    settings = ppo.config.ppo
    updates = settings.epochs * settings.minibatches
    step = make_train_step(ppo.objective, optimizer, microbatches, observe=observe)

    def learn(state: TrainState, frozen, batch: Batch):
        batch = _with_said(ppo, state.params, frozen, batch, microbatches * settings.minibatches)
        batch, carry, metrics = ppo.estimate(state.carry, batch)
        key = jax.random.fold_in(state.key, state.step)
        rows, number = _minibatches(key, batch.rows, settings), jnp.arange(updates, dtype=jnp.int32)

        def update(running, row_and_number):
            state, stopped = running
            row, number = row_and_number
            mini = jax.tree.map(lambda x: _rows(x, row), batch)

            def go(state):
                # Its key is that of this minibatch; the count of steps is that of rollouts again below.
                return step(dataclasses.replace(state, step=state.step * updates + number), frozen, mini)

            def skip(state):
                return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(go, state)[1])

            after, found = jax.lax.cond(stopped, skip, go, state)
            if settings.target_kl is not None:
                stopped |= found["update_kl"].value > settings.target_kl
            return (dataclasses.replace(after, step=state.step), stopped), found

        start = dataclasses.replace(state, carry=carry)
        (state, _), found = jax.lax.scan(update, (start, jnp.bool_(False)), (rows, number))
        metrics |= _over_updates(found)
        if ppo.config.kl.controller == "adaptive":
            moved = controllers.adaptive(
                carry["kl_coef"], metrics["kl"].value, target=ppo.config.kl.target, gain=ppo.config.kl.gain
            )
            state = dataclasses.replace(state, carry=carry | {"kl_coef": moved})
        metrics["updates"] = Mean((found["ratio"].weight > 0).sum().astype(jnp.float32), jnp.float32(1))
        return dataclasses.replace(state, step=state.step + 1), metrics

    return learn


def _with_said(ppo: Ppo, params, frozen, batch: Batch, parts: int) -> Batch:
    """The batch with what the models say of its tokens before the update, a part of the rows at a time."""

    def say(part: Batch):
        stats, values, _ = ppo.says(params, frozen, part)
        logps = ppo.reference_logps(frozen, part)
        return {"old_logps": stats.logps, "entropy": stats.entropy, "old_values": values, "reference_logps": logps}

    dealt = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    said = jax.lax.map(say, dealt)
    said = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), said)
    return dataclasses.replace(batch, token=batch.token | jax.lax.stop_gradient(said))


def _minibatches(key, rows: Rows, settings) -> Array:
    """int32[epochs * minibatches, rows of one]: every epoch all rows, in an order of its own.

    Rows are dealt out in turn, empty ones last: no minibatch is empty while another has two.
    """
    empty = (rows.segments == 0).all(axis=1).astype(jnp.float32)

    def order(key):
        dealt = jnp.argsort(empty + jax.random.uniform(key, empty.shape))
        return dealt.reshape(-1, settings.minibatches).T

    return jax.vmap(order)(jax.random.split(key, settings.epochs)).reshape(settings.epochs * settings.minibatches, -1)


def _rows(x: Array, row: Array) -> Array:
    return constrain(jnp.take(x, row, axis=0), ("batch", *[None] * (x.ndim - 1)))


def _over_updates(found: dict[str, Mean]) -> dict[str, Mean]:
    """Means over the updates that were made, and some of the first one alone, where the ratio should be 1."""
    last = lambda mean: Mean(*(x[jnp.argmax(jnp.cumsum(mean.weight > 0))] for x in (mean.total, mean.weight)))  # noqa: E731
    first = {f"first/{name}": jax.tree.map(lambda x: x[0], found[name]) for name in ("ratio_error", "clip_fraction")}
    state = ("skipped_steps", "bad_in_a_row", "learning_rate", "update_kl")  # as the last update left them
    means = {
        name: last(mean) if name in state else jax.tree.map(lambda x: x.sum(0), mean) for name, mean in found.items()
    }
    means.pop("ratio_error")
    return first | means


def make_ppo_optimizer(config, abstract, axes) -> Optimizer:
    """`make_optimizer` over all updates of a run, with the value model's at a rate of its own.

    optimizer.warmup_steps are steps of the run, of ppo.epochs * ppo.minibatches updates each.
    """
    updates = config.ppo.epochs * config.ppo.minibatches
    settings = dataclasses.replace(config.optimizer, warmup_steps=config.optimizer.warmup_steps * updates)
    found = make_optimizer(settings, config.run.steps * updates, abstract, axes, config.precision.moments)

    def update(gradients, state, params=None):
        changes, state = found.transform.update(gradients, state, params)
        scale = config.value.learning_rate_scale
        return changes | {"value": jax.tree.map(lambda x: x * jnp.asarray(scale, x.dtype), changes["value"])}, state

    return found._replace(transform=optax.GradientTransformation(found.transform.init, update))
