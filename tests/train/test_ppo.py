"""PPO's program against loops, and its invariances; from rollouts made up of random tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpost
from jaxpost import config as configs
from jaxpost.losses import policy as policy_losses
from jaxpost.models.policy import Policy
from jaxpost.ops.completions import at_tokens
from jaxpost.rl import rewards
from jaxpost.sampling.engine import Sampling, sample
from jaxpost.sampling.local import LocalEngine
from jaxpost.sharding import batch_sharding, make_mesh, named_shardings
from jaxpost.train.loop import observer
from jaxpost.train.ppo import Ppo, make_learn, make_ppo_optimizer
from jaxpost.train.rollouts import Rollout, documents, to_batch
from jaxpost.train.value import ValueModel
from jaxpost.types import Origin, TrainState
from tests.models.tiny import random_documents, random_params, tiny_config

G, PROMPTS, NEW = 3, random_documents(4, 7, 1, 5, 3), 6
CONFIG = tiny_config(num_layers=2)


@dataclasses.dataclass(frozen=True)
class Example:
    origin: Origin = dataclasses.field(default_factory=lambda: Origin("test", 1))


@dataclasses.dataclass(frozen=True)
class Asked:
    tokens: np.ndarray
    example: Example = dataclasses.field(default_factory=Example)


def settings(**changes):
    """A resolved config with rows of 64 tokens, two epochs of two minibatches, and these keys changed."""
    config = jaxpost.get_config("ppo")
    config.update_from_flattened_dict(
        {
            "ppo.epochs": 2,
            "ppo.minibatches": 2,
            "batch.rows_per_step": 2,
            "batch.tokens_per_row": 80,
            "batch.documents_per_row": 3,
            "rollout.max_prompt_tokens": 16,
            "sampling.max_new_tokens": 16,
            "sampling.temperature": 0.8,
            "optimizer.learning_rate": 1e-2,
            "optimizer.warmup_steps": 0,
            **changes,
        }
    )
    return configs.resolve(config)


@pytest.fixture(scope="module")
def policy():
    return Policy(CONFIG)


@pytest.fixture(scope="module")
def value():
    policy = Policy(dataclasses.replace(CONFIG, num_scores=1))
    return ValueModel(policy, policy.abstract(), None, policy.axes(), None)


@pytest.fixture(scope="module")
def params(policy, value):
    return {"policy": random_params(policy), "value": random_params(value.policy, seed=1)}


@pytest.fixture(scope="module")
def rollout(policy, params):
    """What the engine draws, one score failed; completions of unequal lengths."""
    engine = LocalEngine(policy, slots=4, context=24, prefill_tokens=8, block_steps=NEW)
    drawn = sample(
        engine,
        params["policy"],
        PROMPTS,
        jax.random.key(3),
        settings=Sampling(NEW, temperature=0.8, stop_ids=(2, 5, 7, 11)),
        completions=G,
    )
    scores = np.random.default_rng(0).normal(size=len(PROMPTS) * G)
    scores[4] = np.nan
    return Rollout(np.arange(len(PROMPTS)), tuple(map(Asked, PROMPTS)), tuple(drawn), scores, {})


def ppo_of(config, policy, value, **changes):
    loss = functools.partial(policy_losses.ppo, epsilon_low=0.2, epsilon_high=0.2)
    return Ppo(policy, value, policy, loss, config, 64, **{"off_policy": False} | changes)


def learnt(config, policy, value, params, rollout, mesh=None, microbatches=None):
    """(state, metrics, batch) after one step."""
    ppo = ppo_of(config, policy, value)
    abstract = {"policy": policy.abstract(), "value": value.abstract}
    axes = {"policy": policy.axes(), "value": value.axes}
    optimizer = make_ppo_optimizer(config, abstract, axes)
    batch, needed = to_batch(rollout, config.batch, branches=G, minibatches=2)
    frozen = {"reference": random_params(policy, seed=2)}
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    placed = jax.device_put(params, named_shardings(axes, mesh, abstract))
    state = TrainState(jnp.int32(0), placed, optimizer.transform.init(placed), jax.random.key(0), ppo.begin())
    learn = make_learn(
        ppo, optimizer.transform, microbatches=microbatches or needed, observe=observer(optimizer.schedule)
    )
    with jax.set_mesh(mesh):
        state, metrics = jax.jit(learn)(state, frozen, jax.device_put(batch, batch_sharding(mesh)))
    return state, {name: float(mean.value) for name, mean in jax.device_get(metrics).items()}, batch


@pytest.fixture(scope="module")
def one_step(policy, value, params, rollout):
    return learnt(settings(), policy, value, params, rollout)


def test_the_first_minibatch_is_on_policy(one_step):
    _, metrics, _ = one_step
    assert metrics["first/ratio_error"] < 1e-5
    assert metrics["first/clip_fraction"] == 0
    assert metrics["sampler_trainer_gap"] < 1e-4
    assert metrics["updates"] == 4
    assert metrics["clip_fraction"] > 0 and metrics["update_kl"] > 0  # later ones are not


def test_estimates_equal_a_loop(policy, value, params, rollout):
    """Rewards, advantages and returns of packed rows against each completion alone, token by token."""
    config = settings(**{"ppo.whiten_advantages": False, "score.missing_eos_penalty": 0.5, "ppo.gamma": 0.97})
    ppo = ppo_of(config, policy, value)
    batch, _ = to_batch(rollout, config.batch, branches=G, minibatches=2)
    rng = np.random.default_rng(1)
    shape, mask = batch.rows.tokens.shape, batch.rows.weights
    said = {name: rng.normal(size=shape).astype(np.float32) for name in ("old_logps", "old_values", "reference_logps")}
    batch = dataclasses.replace(batch, token=batch.token | said | {"entropy": np.zeros(shape, np.float32)})
    found, carry, metrics = jax.jit(ppo.estimate)(ppo.begin(), batch)
    kls, checked = [], 0
    for row, m, n in zip(*np.nonzero(batch.completion["scored"]), strict=True):
        inside = (batch.rows.segments[row] == m + 1) & (batch.rows.branches[row] == n + 1) & (mask[row] > 0)
        logps, values, reference = (said[name][row, inside] for name in ("old_logps", "old_values", "reference_logps"))
        given = -0.05 * (logps - reference)
        given[-1] += batch.completion["score"][row, m, n] - 0.5 * (1 - batch.completion["ended"][row, m, n])
        advantages, after, value_after = np.zeros(len(given)), 0.0, 0.0
        for t in reversed(range(len(given))):
            delta = given[t] + 0.97 * value_after - values[t]
            after = delta + 0.97 * 0.95 * after
            advantages[t], value_after = after, values[t]
        np.testing.assert_allclose(found.token["advantages"][row, inside], advantages, atol=1e-5)
        np.testing.assert_allclose(found.token["returns"][row, inside], advantages + values, atol=1e-5)
        kls.append((logps - reference).sum())
        checked += inside.sum()
    assert len(kls) == len(PROMPTS) * G - 1 and checked == mask.sum()
    np.testing.assert_allclose(metrics["kl"].value, np.mean(kls), rtol=1e-5)
    scores = rollout.scores[np.isfinite(rollout.scores)]
    np.testing.assert_allclose(metrics["reward"].value, scores.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        [carry["scores"].mean, carry["scores"].std], [scores.mean(), scores.std(ddof=1)], rtol=1e-5
    )


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_learn_as_one(policy, value, params, rollout, sizes):
    """By SGD-like steps: Adam's first step has the sign of a gradient that rounding may turn."""
    config = settings(**{"optimizer.eps": 1.0, "batch.rows_per_step": 4})
    one, metrics, _ = learnt(config, policy, value, params, rollout)
    eight, found, _ = learnt(config, policy, value, params, rollout, make_mesh(**sizes))
    close(eight.params, one.params)
    assert found == pytest.approx(metrics, abs=1e-4)


def test_microbatches_change_nothing(policy, value, params, rollout):
    config = settings(**{"optimizer.eps": 1.0, "batch.rows_per_step": 4})
    one, _, _ = learnt(config, policy, value, params, rollout, microbatches=1)
    two, _, _ = learnt(config, policy, value, params, rollout, microbatches=2)
    close(two.params, one.params)


def test_an_update_stops_at_its_kl(policy, value, params, rollout, one_step):
    state, metrics, _ = learnt(settings(**{"ppo.target_kl": 1e-6}), policy, value, params, rollout)
    assert metrics["updates"] == 2  # the first one is on policy; the second one sees what it has moved
    assert int(state.step) == 1
    differ = [
        bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (state.params, one_step[0].params)), strict=True)
    ]
    assert any(differ)


def test_the_kl_coefficient_follows_its_target(policy, value, params, rollout, one_step):
    kl = one_step[1]["kl"]
    for target, sign in ((0.5 * kl, 1), (2 * kl, -1)):
        config = settings(**{"kl.controller": "adaptive", "kl.target": target})
        state, metrics, _ = learnt(config, policy, value, params, rollout)
        assert metrics["kl_coef"] == pytest.approx(0.05)
        assert float(state.carry["kl_coef"]) == pytest.approx(0.05 * (1 + sign * 0.1 * 0.2))


def test_groups_that_do_not_fit_in_a_row_are_split(rollout):
    longest = max(len(c.tokens) for group in rollout.completions for c in group)
    narrow = max(map(len, PROMPTS)) - 1 + longest + 1
    parts = documents(rollout, narrow)
    assert len(parts) > len(PROMPTS) and all(part.cost <= narrow for part in parts)
    found = [tokens.tolist() for part in parts for tokens in part.completions]
    assert found == [c.tokens.tolist() for group in rollout.completions for c in group]
    scored = [s for part in parts for s in part.completion["scored"]]
    assert scored.count(0.0) == 1 and scored[4] == 0.0


@pytest.mark.parametrize(
    ("changes", "without"), [({"score.missing_eos_penalty": 0.5}, 0.0 - 0.5), ({"score.missing_eos_score": -7.0}, -7.0)]
)
def test_scores_are_normalised_clipped_then_penalised(policy, value, changes, without):
    """Penalties are in the units of what the policy learns from; a fixed score for no end replaces all before it."""
    changes = {"score.missing_eos_penalty": 0.0, "score.normalize": True, "score.clip": 1.0, **changes}
    ppo = ppo_of(settings(**changes, **{"score.length_penalty": 0.1, "score.free_tokens": 5}), policy, value)
    raw, lengths, ended = jnp.array([[[1.0, 3.0, 9.0]]]), jnp.array([[[4.0, 6.0, 8.0]]]), jnp.array([[[1.0, 0.0, 1.0]]])
    seen = rewards.observe(rewards.Moments.none(), jnp.array([1.0, 3.0, 5.0]))  # mean 3, deviation 2
    found = ppo.shaped(raw, ended, lengths, seen)
    np.testing.assert_allclose(found, [[[-1.0, without - 0.1, 1.0 - 0.3]]], rtol=1e-6)


def batch_that_says(rollout, config):
    """Its batch, with what the models say made up."""
    batch, _ = to_batch(rollout, config.batch, branches=G, minibatches=2)
    rng, names = np.random.default_rng(1), ("old_logps", "old_values", "reference_logps", "entropy")
    said = {name: rng.normal(size=batch.rows.tokens.shape).astype(np.float32) for name in names}
    return dataclasses.replace(batch, token=batch.token | said)


def penalised(config, batch):
    """[B, M, N]: the scores less the penalty for no end."""
    return batch.completion["score"] - config.score.missing_eos_penalty * (1 - batch.completion["ended"])


def test_whitened_rewards_keep_their_mean(policy, value, rollout):
    """At gamma = lambda = 1 a return is the sum of the rewards to come."""
    config = settings(**{"ppo.whiten_rewards": True, "ppo.lam": 1.0})
    ppo = ppo_of(config, policy, value)
    batch = batch_that_says(rollout, config)
    found, _, _ = jax.jit(ppo.estimate)(ppo.begin(), batch)
    mask, said = batch.rows.weights > 0, batch.token
    last = mask & ~np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    raw = -0.05 * (said["old_logps"] - said["reference_logps"])
    raw[last] += np.asarray(at_tokens(penalised(config, batch), batch.rows))[last]
    whitened = (raw - raw[mask].mean()) / raw[mask].std(ddof=1) + raw[mask].mean()
    returns = np.zeros_like(raw)
    for t in reversed(range(raw.shape[1])):
        after = np.where(last[:, t], 0.0, returns[:, t + 1] if t + 1 < raw.shape[1] else 0.0)
        returns[:, t] = whitened[:, t] + after
    np.testing.assert_allclose(found.token["returns"][mask], returns[mask], atol=1e-4)


def test_kl_and_entropy_as_terms_of_the_loss(policy, value, params, rollout):
    config = settings(**{"kl.where": "loss", "kl.estimator": "k2", "ppo.entropy_coef": 0.01, "ppo.lam": 1.0})
    ppo = ppo_of(config, policy, value)
    batch = batch_that_says(rollout, config)

    @jax.jit
    def all_of_it(params, batch):
        batch, carry, _ = ppo.estimate(ppo.begin(), batch)
        return batch, ppo.says(params, {}, batch)[0], ppo.objective(params, {}, carry, batch, None)[0]

    batch, stats, terms = all_of_it(params, batch)
    mask = batch.rows.weights > 0
    scores = np.asarray(at_tokens(penalised(config, batch), batch.rows))
    np.testing.assert_allclose(batch.token["returns"][mask], scores[mask], atol=1e-5)  # no KL in the reward
    assert (terms["kl"].coefficient, terms["entropy"].coefficient) == (pytest.approx(0.05), -0.01)
    k2 = 0.5 * (stats.logps - batch.token["reference_logps"])[mask] ** 2
    np.testing.assert_allclose(terms["kl"].mean.value, k2.mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["entropy"].mean.value, stats.entropy[mask].mean(), rtol=1e-5)


def test_the_value_model_has_a_rate_of_its_own():
    params = {"policy": {"weight": jnp.ones(2)}, "value": {"weight": jnp.ones(2)}}
    axes = {"policy": {"weight": ("embed",)}, "value": {"weight": ("embed",)}}
    optimizer = make_ppo_optimizer(settings(**{"value.learning_rate_scale": 0.25}), params, axes).transform
    gradients = jax.tree.map(jnp.ones_like, params)
    changes, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(changes["value"]["weight"], 0.25 * changes["policy"]["weight"], rtol=1e-6)
    assert (changes["value"]["weight"] < 0).all()
