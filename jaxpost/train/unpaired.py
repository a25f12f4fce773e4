"""The objective of single completions that are good or bad (KTO, BCO), and what it remembers."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpost.losses.unpaired import kl, reward_shift
from jaxpost.ops.completions import completion_sums
from jaxpost.train.objectives import cached_reference, forward, hyperparameter, token_metrics
from jaxpost.train.step import Carry
from jaxpost.types import Batch, Mean, Term

OWN, MISMATCHED = 0, 1  # branches: the completion that has the label, and one to another prompt


def unpaired_objective(policy, name: str, loss, *, chunk: int, reference_logps=cached_reference):
    """Mean over completions of `loss(policy, reference, label, baseline)` (`losses.unpaired`, hyperparameters bound).

    The baseline "kl" is estimated on the mismatched completions of the microbatch. "reward" is the mean of all rewards
    so far: those of the steps before (`carry["rewards"]`, a Mean; see `running_rewards`) and of the microbatch at hand.
    reference_logps: as `Reference.logps` (train/reference.py).
    """
    baseline, beta = baseline_of(loss), hyperparameter(loss, "beta", 1.0)

    def objective(params, frozen, carry, batch: Batch, key):
        mask, rows = batch.completion["mask"], batch.rows
        stats, terms, metrics = forward(policy, params, batch, chunk=chunk, key=key)
        theirs = jax.lax.stop_gradient(reference_logps(frozen, carry, batch))
        scored = (rows.weights != 0).astype(jnp.float32)
        sums = [completion_sums(logps * scored, rows, *mask.shape[1:]) for logps in (stats.logps, theirs)]
        of = lambda x, branch: x[..., branch].reshape(-1)  # noqa: E731
        ours, theirs = (of(x, OWN) for x in sums)
        label, valid = of(batch.completion["label"], OWN), of(mask, OWN)
        rewards, shift = jax.lax.stop_gradient(beta * (ours - theirs)), jnp.float32(0)
        if baseline == "kl":
            shift = kl(*(of(x, MISMATCHED) for x in sums), of(mask, MISMATCHED))
        elif baseline == "reward":
            shift = reward_shift(carry["rewards"], rewards, valid).value
        count = valid.sum()
        values = jnp.where(valid > 0, loss(ours, theirs, label, shift), 0.0)
        terms[name] = Term(1.0, Mean(values.sum(), count))
        own = dataclasses.replace(rows, weights=jnp.where(rows.branches == 1 + MISMATCHED, 0.0, rows.weights))
        metrics |= token_metrics(stats, own) | label_metrics(ours, rewards, label, valid)
        if baseline is not None:
            metrics["kl" if baseline == "kl" else "delta"] = Mean(shift * count, count)
        return terms, jax.lax.stop_gradient(metrics)

    return objective


def baseline_of(loss) -> str | None:
    """What a loss is measured from: "kl", "reward" or None, which is also that of an undecorated one."""
    return getattr(getattr(loss, "func", loss), "baseline", None)


def running_rewards(mesh) -> Carry:
    """What BCO remembers: the sum and the number of all rewards of the steps before."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    zero = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    load = lambda: {"rewards": Mean(*jax.device_put((jnp.float32(0), jnp.float32(0)), everywhere))}  # noqa: E731
    return Carry({"rewards": Mean(zero, zero)}, load, add_rewards)


def add_rewards(carry, params, metrics, applied):
    """The carry after a step: each of its completions counts once, however the step was cut."""
    return carry | {"rewards": carry["rewards"] + metrics["rewards/chosen"] + metrics["rewards/rejected"]}


def label_metrics(logps, rewards, label, valid) -> dict[str, Mean]:
    """The quantities that TRL logs for KTO, under its names: chosen are the good ones, rejected the bad."""
    good, bad = valid * label, valid * (1 - label)
    values = {"rewards": rewards, "logps": logps}
    sides = {"chosen": good, "rejected": bad}
    return {f"{n}/{s}": Mean((value * of).sum(), of.sum()) for n, value in values.items() for s, of in sides.items()}
