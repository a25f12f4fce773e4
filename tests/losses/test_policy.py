"""Policy-gradient losses, the value loss and KL estimates against loops and hand arithmetic."""

import doctest
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses import kl, policy, value

WAYS = [{}, {"epsilon_low": 0.1, "epsilon_high": 0.3}, {"dual_clip": 3.0}]


@pytest.mark.parametrize("module", [policy, value, kl])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def random_tokens(shape=(4, 16), seed: int = 0):
    draw = np.random.default_rng(seed)
    return jnp.float32(draw.normal(size=shape)), jnp.float32(draw.normal(size=shape))


@pytest.mark.parametrize("given", WAYS)
def test_ppo_by_a_loop(given):
    """Values, and a gradient of ratio * advantage exactly where is_clipped is 0."""
    log_ratios, advantages = random_tokens()
    low, high, dual = given.get("epsilon_low", 0.2), given.get("epsilon_high", 0.2), given.get("dual_clip", math.inf)
    expected, clipped = np.zeros(log_ratios.shape), np.zeros(log_ratios.shape)
    for place, advantage in np.ndenumerate(advantages):
        ratio = math.exp(log_ratios[place])
        if advantage >= 0:
            used = min(ratio, 1 + high)
        else:
            used = min(max(ratio, 1 - low), dual)
        expected[place], clipped[place] = -used * advantage, used != ratio
    assert 0 < clipped.sum() < clipped.size
    loss = lambda x: policy.ppo(x, advantages, **given)  # noqa: E731
    np.testing.assert_allclose(loss(log_ratios), expected, rtol=1e-5)
    np.testing.assert_array_equal(policy.is_clipped(log_ratios, advantages, **given), clipped)
    grad = jax.grad(lambda x: loss(x).sum())(log_ratios)
    np.testing.assert_allclose(grad, np.where(clipped, 0, expected), rtol=1e-5)


def test_dual_clip_is_a_bound_for_bad_tokens_alone():
    log_ratios, advantages = jnp.log(jnp.array([9.0, 9.0])), jnp.array([1.0, -1.0])
    np.testing.assert_allclose(policy.ppo(log_ratios, advantages, dual_clip=3.0), [-1.2, 3.0], rtol=1e-6)


def of_logps(name, logps, old, advantages, **given):
    """A loss of the table, as a function of the log-probabilities."""
    loss_fn = policy.LOSSES[name]
    reads = inspect.signature(loss_fn).parameters
    inputs = {"log_ratios": logps - old, "advantages": advantages, "logps": logps}
    return loss_fn(**{key: value for key, value in inputs.items() if key in reads}, **given)


EVERY = [*((name, {}) for name in policy.LOSSES), *(("ppo", given) for given in WAYS[1:])]


@pytest.mark.parametrize("name, given", EVERY)
def test_at_the_start_of_an_update_the_gradient_is_the_policy_gradient(name, given):
    logps, advantages = random_tokens()
    grad = jax.grad(lambda x: of_logps(name, x, logps, advantages, **given).sum())(logps)
    np.testing.assert_allclose(grad, -advantages, rtol=1e-5)
    assert policy.is_clipped(jnp.zeros_like(advantages), advantages).sum() == 0


@pytest.mark.parametrize("name, given", EVERY)
@pytest.mark.parametrize("far", [-1e4, -100.0, 100.0, 1e4])
def test_a_token_far_off_policy_leaves_values_and_gradients_finite(name, given, far):
    advantages, logps = jnp.array([-1.0, 0.0, 1.0]), jnp.full(3, -2.0)
    value, grad = jax.value_and_grad(lambda x: of_logps(name, x, logps - far, advantages, **given).sum())(logps)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_soft_relatives_by_a_loop():
    logps, advantages = random_tokens()
    old = logps - random_tokens(seed=1)[0]
    for place, advantage in np.ndenumerate(np.float64(advantages)):
        logp, ratio = float(logps[place]), math.exp(float(logps[place] - old[place]))
        tau, k, lam = (0.8, 2.0, 3.0) if advantage > 0 else (1.2, 3.0, 2.0)
        expected = {
            "cispo": -min(ratio, 1.5) * advantage * logp,
            "sapo": -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage,
            "vespo": -(ratio**k) * math.exp(lam * (1 - ratio)) * advantage * logp,
        }
        hyper = {"cispo": {"ratio_high": 1.5}, "sapo": {"temperature_positive": 0.8, "temperature_negative": 1.2}}
        for name, wanted in expected.items():
            found = of_logps(name, logps[place], old[place], advantages[place], **hyper.get(name, {}))
            np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("name", ["cispo", "vespo"])
def test_weights_of_the_score_have_no_gradient(name):
    """The gradient is weight * advantage, of the log-probability alone."""
    logps, advantages = random_tokens()
    old = logps - random_tokens(seed=1)[0]
    values = of_logps(name, logps, old, advantages)
    grad = jax.grad(lambda x: of_logps(name, x, old, advantages).sum())(logps)
    np.testing.assert_allclose(grad, values / logps, rtol=1e-5)


def test_three_means_by_a_loop_and_over_microbatches():
    """What stands outside the mask, NaN too, counts for nothing; an empty completion counts as one."""
    losses, mask = random_tokens()[0], np.float32(np.random.default_rng(2).random((4, 16)) < 0.6)
    mask[2] = 0
    rows = [[float(x) for x, inside in zip(*row, strict=True) if inside] for row in zip(losses, mask, strict=True)]
    tokens = [x for row in rows for x in row]
    expected = [sum(tokens) / len(tokens), sum(sum(r) / max(len(r), 1) for r in rows) / 4, sum(tokens) / 4 / 20]
    losses = jnp.where(mask > 0, losses, jnp.nan)

    def means(part):
        x, inside = losses[part], jnp.array(mask[part])
        lengths = inside.sum(1, keepdims=True)
        return (
            policy.token_mean(x, inside),
            policy.completion_mean(x, inside, lengths, len(x)),
            policy.constant_mean(x, inside, len(x), length=20),
        )

    np.testing.assert_allclose([mean.value for mean in means(slice(0, 4))], expected, rtol=1e-5)
    parts = zip(means(slice(0, 1)), means(slice(1, 4)), strict=True)
    np.testing.assert_allclose([(a + b).value for a, b in parts], expected, rtol=1e-5)


def test_the_tokens_of_highest_entropy():
    draw = np.random.default_rng(0)
    entropies, mask = jnp.float32(draw.permutation(100).reshape(4, 25)), jnp.ones((4, 25)).at[3].set(0)
    kept = policy.high_entropy_mask(entropies, mask, share=0.2)
    of_tokens = np.sort(np.asarray(entropies)[:3].ravel())
    assert kept.sum() == 15 and (kept[3] == 0).all()
    assert entropies[kept > 0].min() == of_tokens[-15]


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_value_loss_by_a_loop(clip_range):
    values, returns = random_tokens()
    old = values + random_tokens(seed=1)[0] * 0.3
    expected, clipped = np.zeros(values.shape), np.zeros(values.shape)
    for place, new in np.ndenumerate(values):
        near = float(np.clip(new, old[place] - 0.2, old[place] + 0.2)) if clip_range else float(new)
        errors = (float(new) - float(returns[place])) ** 2, (near - float(returns[place])) ** 2
        expected[place], clipped[place] = max(errors) / 2, errors[1] > errors[0]
    assert 0 < clipped.sum() < clipped.size if clip_range else clipped.sum() == 0
    given = {"clip_range": clip_range}
    np.testing.assert_allclose(value.squared_error(values, old, returns, **given), expected, rtol=1e-5)
    np.testing.assert_array_equal(value.is_clipped(values, old, returns, **given), clipped)
    grad = jax.grad(lambda v: value.squared_error(v, old, returns, **given).sum())(values)
    np.testing.assert_array_equal((grad == 0) & (values != returns), clipped)


def distributions():
    """log pi and log pi_ref over 6 tokens."""
    draw = np.random.default_rng(0)
    return (jax.nn.log_softmax(jnp.float32(draw.normal(size=6))) for _ in range(2))


def test_kl_estimates_on_average():
    """Over all tokens, as often as the policy draws each: k1, k3 are the KL, k2 is near; k2, k3 are never below 0."""
    ours, reference = distributions()
    exact = float((jnp.exp(ours) * (ours - reference)).sum())
    mean = {name: float((jnp.exp(ours) * k(ours, reference)).sum()) for name, k in kl.KL_ESTIMATORS.items()}
    assert set(mean) == {"k1", "k2", "k3"}
    np.testing.assert_allclose([mean["k1"], mean["k3"]], exact, rtol=1e-5)
    np.testing.assert_allclose(mean["k2"], exact, rtol=0.5)
    assert (kl.k1(ours, reference) < 0).any()
    assert (kl.k2(ours, reference) >= 0).all() and (kl.k3(ours, reference) >= 0).all()


def test_gradients_of_kl_estimates_on_average():
    """As a loss: k1's gradient is 0, k2's that of KL(pi || ref), k3's that of KL(ref || pi)."""
    ours, reference = distributions()

    def gradient(estimate):
        drawn = jax.lax.stop_gradient(jnp.exp(ours))
        return jax.grad(lambda logits: (drawn * estimate(jax.nn.log_softmax(logits), reference)).sum())(ours)

    def exact(logits, towards):
        logps = jax.nn.log_softmax(logits)
        p, q = (logps, reference) if towards == "reverse" else (reference, logps)
        return (jnp.exp(p) * (p - q)).sum()

    np.testing.assert_allclose(gradient(kl.k1), np.zeros(6), atol=1e-6)
    np.testing.assert_allclose(gradient(kl.k2), jax.grad(exact)(ours, "reverse"), atol=1e-6)
    np.testing.assert_allclose(gradient(kl.k3), jax.grad(exact)(ours, "forward"), atol=1e-6)
    assert np.abs(jax.grad(exact)(ours, "reverse") - jax.grad(exact)(ours, "forward")).max() > 1e-2


def test_k3_of_a_token_that_the_policy_hardly_says_is_finite():
    value, grad = jax.value_and_grad(kl.k3)(jnp.float32(-200.0), jnp.float32(0.0))
    assert np.isfinite(value) and np.isfinite(grad)


def test_importance_weights_have_no_gradient_and_refuse_another_word():
    assert jax.grad(policy.importance_weights)(jnp.float32(0.1)) == 0
    weights = policy.importance_weights(jnp.log(jnp.array([0.2, 1.0, 9.0])), low=0.5, high=None)
    np.testing.assert_allclose(weights, [0.5, 1.0, 9.0], rtol=1e-6)
    with pytest.raises(ValueError, match="outside: 'drop', expected truncate or mask"):
        policy.importance_weights(jnp.zeros(1), outside="drop")
