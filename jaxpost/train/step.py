"""One train step for all stages: gradient of an objective, exact under accumulation, and an optimizer update.

An objective is `(params, frozen, carry, batch, key) -> ({name: Term}, {name: Mean})`, pure, hyperparameters bound.
The loss is the sum over terms of coefficient * total / weight. In evaluation there is no key, and nothing is drawn.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpost.sharding import back, on_device
from jaxpost.train.optimizer import apply_updates
from jaxpost.types import Batch, Mean, TrainState


@dataclasses.dataclass(frozen=True)
class Carry:
    """What a method remembers between steps (`TrainState.carry`): how it begins, and what a step makes of it.

    abstract: a tree of ShapeDtypeStructs with shardings. load: () -> its first values, in their shards.
    advance: (carry, parameters after the update, {name: Mean} of the step, updates done) -> carry. Not of a step
      that was skipped.
    """

    abstract: Any
    load: Callable[[], Any]
    advance: Callable[[Any, Any, dict[str, Mean], Any], Any]


def join(*carries: Carry | None) -> Carry | None:
    """Carries of dicts as one, that of None left out; None where there is none."""
    found = [carry for carry in carries if carry is not None]

    def advance(carry, *step):
        return functools.reduce(lambda carry, one: one.advance(carry, *step), found, carry)

    merge = lambda parts: {name: value for part in parts for name, value in part.items()}  # noqa: E731
    abstract = merge(carry.abstract for carry in found)
    return Carry(abstract, lambda: merge(carry.load() for carry in found), advance) if found else None


def make_train_step(
    objective, optimizer: optax.GradientTransformation, accumulate: int = 1, *, observe=None, advance=None
):
    """`(state, frozen, batch) -> (state, {name: Mean})`, to be jit-compiled at the edge with the state donated.

    observe: (optimizer state before, after) -> {name: scalar}, logged with the metrics.
    advance: as in `Carry`, for an optimizer of `make_optimizer`; None leaves the carry as it is.

    The batch is cut into `accumulate` microbatches. Weights of terms depend on the batch alone; they are summed over
    the whole step before the backward pass, so the gradient is that of the whole batch, whatever `accumulate` is.
    Raises ValueError when accumulate does not divide the rows of the batch.
    """

    def step(state: TrainState, frozen, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        micro = _microbatches(batch, accumulate)
        keys = jax.random.split(key, accumulate)
        weights = _step_weights(objective, state, frozen, micro, keys)

        def loss_fn(params, batch, key):
            terms, metrics = objective(params, frozen, state.carry, batch, key)
            shares = {name: term.coefficient * term.mean.total / weights[name] for name, term in terms.items()}
            loss = sum(shares.values())
            return loss, {"loss": Mean(loss, jnp.float32(1)), **_term_metrics(terms), **metrics}

        grads, metrics = _accumulated(jax.grad(loss_fn, has_aux=True), state.params, micro, keys)
        updates, opt_state = optimizer.update(grads, on_device(state.opt_state), state.params)
        opt_state = back(opt_state, like=state.opt_state)
        params = apply_updates(state.params, updates)
        metrics["loss"] = Mean(metrics["loss"].total, jnp.float32(1))  # microbatch shares add up to the loss
        for name, value in observe(state.opt_state, opt_state).items() if observe else ():
            metrics[name] = Mean(value, jnp.float32(1))
        carry = state.carry
        if advance is not None:
            applied = opt_state.applied > state.opt_state.applied
            carry = advance(carry, params, metrics, opt_state.applied)
            carry = jax.tree.map(lambda after, before: jnp.where(applied, after, before), carry, state.carry)
        return TrainState(state.step + 1, params, opt_state, state.key, carry), metrics

    return step


def make_eval_step(objective):
    """`(params, frozen, carry, batch) -> (terms, metrics)`: Means add up over batches, `total_loss` ends it."""

    def step(params, frozen, carry, batch: Batch):
        return objective(params, frozen, carry, batch, None)

    return step


def total_loss(terms) -> float:
    """Sum of coefficient * total / weight over terms."""
    return float(sum(term.coefficient * term.mean.value for term in terms.values()))


def _term_metrics(terms):
    return {f"loss/{name}": jax.lax.stop_gradient(term.mean) for name, term in terms.items()}


def _microbatches(batch, accumulate):
    """Leaves [B, ...] -> [accumulate, B / accumulate, ...].

    Rows are dealt out in turn: `reshape(accumulate, -1)` of a sharded batch would gather it on every device.
    """

    def deal(x):
        if x.shape[0] % accumulate:
            raise ValueError(f"accumulate = {accumulate} does not divide {x.shape[0]} rows")
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(deal, batch)


def _step_weights(objective, state, frozen, micro, keys):
    """Weight of each term over the whole step, and 1 where it is 0. The compiler drops all else of this pass."""

    def weights_of(batch_and_key):
        terms, _ = objective(state.params, frozen, state.carry, *batch_and_key)
        return {name: term.mean.weight for name, term in terms.items()}

    weights = jax.lax.map(weights_of, (micro, keys))
    total = jax.tree.map(lambda w: w.sum(0), weights)
    return jax.lax.stop_gradient(jax.tree.map(lambda w: jnp.where(w == 0, 1.0, w), total))


def _accumulated(grad_fn, params, micro, keys):
    """Sum of gradients (f32) and of metrics over microbatches."""
    accumulate = keys.shape[0]
    first = jax.tree.map(lambda x: x[0], (micro, keys))
    if accumulate == 1:
        return grad_fn(params, *first)
    zeros = jax.eval_shape(grad_fn, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), zeros)

    def body(total, batch_and_key):
        part = grad_fn(params, *batch_and_key)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part), None

    return jax.lax.scan(body, zeros, (micro, keys))[0]
