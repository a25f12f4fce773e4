"""Policy-gradient losses, the value loss and KL estimates against loops and hand arithmetic."""

import doctest
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


@pytest.mark.parametrize("given", WAYS)
def test_at_the_start_of_an_update_nothing_is_clipped_and_the_gradient_is_the_policy_gradient(given):
    _, advantages = random_tokens()
    log_ratios = jnp.zeros_like(advantages)
    loss, grad = jax.value_and_grad(lambda x: policy.ppo(x, advantages, **given).sum())(log_ratios)
    np.testing.assert_allclose(loss, -advantages.sum(), rtol=1e-6)
    np.testing.assert_allclose(grad, -advantages, rtol=1e-6)
    assert policy.is_clipped(log_ratios, advantages, **given).sum() == 0


@pytest.mark.parametrize("given", WAYS)
@pytest.mark.parametrize("far", [-1e4, -100.0, 100.0, 1e4])
def test_a_token_far_off_policy_leaves_values_and_gradients_finite(given, far):
    for advantage in (-1.0, 0.0, 1.0):
        loss, grad = jax.value_and_grad(policy.ppo)(jnp.float32(far), jnp.float32(advantage), **given)
        assert np.isfinite(loss) and np.isfinite(grad)


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
