"""The objective of reward models: from the scores of a ranking's completions and a loss of `losses.reward`."""

import inspect

import jax
import jax.numpy as jnp

from jaxpost.errors import ConfigError
from jaxpost.train.objectives import expert_terms
from jaxpost.train.scores import completion_scores
from jaxpost.types import Array, Batch, Mean, Term

PAIR = ("chosen", "rejected", "margin")  # what a loss of pairs takes
TAKEN = ("rewards", "mask", "scores", *PAIR)  # what any loss may take


def reward_objective(policy, loss, *, branches: int, margin: float = 0.0, bootstrap_seed: int | None = None):
    """Mean over rankings (or completions, as the loss has it) and heads of a loss of `losses.reward`.

    branches: most completions of a ranking.
    margin: what a loss of pairs asks for a point of difference between the scores that the data give.
    bootstrap_seed: each of several heads learns from half of the examples (`head_weights`); None: all from all.
    Rankings come with `batch.completion["score"]`, best first. frozen and carry are not read.
    Raises ConfigError where the loss takes what rankings do not hold, or pairs alone and there are longer rankings.
    """
    takes = taken(loss)
    if set(takes) & set(PAIR) and branches != 2:
        raise ConfigError(f"loss.name: a loss of pairs, but the data have rankings of {branches}; set all_pairs, say")

    def objective(params, frozen, carry, batch: Batch, key):
        scores, router = completion_scores(policy, params, batch, key)
        mask, given = batch.completion["mask"], batch.completion["score"]
        heads = jnp.ones((*mask.shape[:2], scores.shape[-1]))
        if bootstrap_seed is not None:
            heads = head_weights(batch.example_ids, scores.shape[-1], bootstrap_seed)
        terms, metrics = expert_terms(policy, router, batch.rows)
        term = ranking_loss(loss, takes, scores, given, mask, heads, margin)
        metrics |= score_metrics(scores, given, mask)
        return {"reward": Term(1.0, term), **terms}, jax.lax.stop_gradient(metrics)

    return objective


def process_objective(policy, loss):
    """Mean over the ends of steps and heads of a loss of `losses.reward` that takes (rewards, labels).

    Answers come with `batch.token["step"]`, 1 at the last token of each step, and `["label"]`. frozen and carry are not
    read. A step counts as judged right where the sign of its score says what its label does.
    """

    def objective(params, frozen, carry, batch: Batch, key):
        hidden, router = policy.hidden(params, batch.rows)
        scores, labels = policy.scores(params, hidden), batch.token["label"][..., None]
        steps, reward = batch.token["step"], scores.mean(-1)
        terms, metrics = expert_terms(policy, router, batch.rows)
        of_steps = lambda values: Mean((values * steps).sum(), steps.sum())  # noqa: E731
        right = (reward > 0) == (labels[..., 0] > 0.5)
        metrics |= {"accuracy": of_steps(right.astype(jnp.float32)), "mean_reward": of_steps(reward)}
        term = of_steps(loss(scores, jnp.broadcast_to(labels, scores.shape)).mean(-1))
        return {"reward": Term(1.0, term), **terms}, jax.lax.stop_gradient(metrics)

    return objective


def taken(loss) -> tuple[str, ...]:
    """The names of a loss's arrays. Raises ConfigError for one that rankings do not hold."""
    parameters = inspect.signature(loss).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
    if unknown := [name for name in names if name not in TAKEN]:
        raise ConfigError(f"loss.name: the loss takes {unknown[0]!r}; rankings of completions hold {', '.join(TAKEN)}")
    return names


def ranking_loss(loss, takes, scores, given, mask, heads, margin: float) -> Mean:
    """The loss over rankings and heads: scores [..., N, R], given and mask [..., N], weights of the heads [..., R]."""
    rewards = jnp.swapaxes(scores, -1, -2)
    alike = lambda x: jnp.broadcast_to(x[..., None, :], rewards.shape)  # noqa: E731
    values = {"rewards": rewards, "mask": alike(mask), "scores": alike(given)}
    if set(takes) & set(PAIR):
        distance = alike(given)[..., 0] - alike(given)[..., 1]
        values |= {"chosen": rewards[..., 0], "rejected": rewards[..., 1], "margin": margin * distance}
    found = loss(*(values[name] for name in takes))
    weights = heads * (mask.sum(-1) > 1)[..., None]
    if found.ndim == rewards.ndim:  # one value a completion
        weights = heads[..., None] * values["mask"]
    return Mean((found * weights).sum(), weights.sum())


def head_weights(example_ids: Array, heads: int, seed: int) -> Array:
    """f32[B, M, R]: 2 where a head learns from an example, else 0, evenly and the same in every epoch.

    Half-sampling is a bootstrap without repetitions (the "double-or-nothing" of Owen and Eckles 2012,
    arXiv:1106.2125); heads on one trunk with data of their own are those of Osband et al. 2016, "Deep Exploration via
    Bootstrapped DQN", arXiv:1602.04621. Linear heads that all saw the same examples would come to agree.
    """

    def of_example(index):
        return jax.random.bernoulli(jax.random.fold_in(jax.random.key(seed), index), shape=(heads,))

    flat = jax.vmap(of_example)(example_ids.reshape(-1).astype(jnp.uint32))
    return 2.0 * flat.reshape(*example_ids.shape, heads).astype(jnp.float32)


def score_metrics(scores, given, mask) -> dict[str, Mean]:
    """What TRL logs of a reward model, under its names, of the heads' mean; a tie of two scores counts as wrong.

    Pairs are all those of a ranking that the data tell apart. min_reward and max_reward are of a microbatch.
    """
    reward, count = scores.mean(-1), mask.sum()
    pairs = (given[..., :, None] > given[..., None, :]) * mask[..., :, None] * mask[..., None, :]
    margins = reward[..., :, None] - reward[..., None, :]
    of_pairs = lambda values: Mean((values * pairs).sum(), pairs.sum())  # noqa: E731
    extreme = lambda reduce, other: Mean(reduce(jnp.where(mask > 0, reward, other)) * count, count)  # noqa: E731
    found = {
        "accuracy": of_pairs((margins > 0).astype(jnp.float32)),
        "margin": of_pairs(margins),
        "mean_reward": Mean((reward * mask).sum(), count),
        "min_reward": extreme(jnp.min, jnp.max(reward)),
        "max_reward": extreme(jnp.max, jnp.min(reward)),
    }
    if scores.shape[-1] > 1:
        found["spread"] = Mean((scores.std(-1) * mask).sum(), count)
    return found
