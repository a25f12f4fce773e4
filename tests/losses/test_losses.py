"""Losses against hand arithmetic and plain loops; reference values are in tests/parity/oracles.py."""

import doctest
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import losses
from jaxpost.losses import distill, pairs, policy, preference, reward, sft, unpaired
from tests.parity.oracles import check_file
from tests.shared import SHARED, needs_shared

ORACLES = [
    *("dpo", "kto", "orpo", "cpo", "reward", "bco", "sft", "fused_lm_head", "distill"),
    *("ppo", "grpo", "grpo_is_correction", "grpo_advantages", "rloo"),
]


@pytest.mark.parametrize("module", [pairs, preference, unpaired, reward, sft, distill])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("table", [preference, unpaired, reward, policy, sft, distill])
def test_every_loss_names_its_source(table):
    for name, loss in table.LOSSES.items():
        assert name == "nll" or "arXiv:" in loss.__doc__, name


@needs_shared
@pytest.mark.parametrize("name", ORACLES)
def test_reference_values(name):
    """Every case, values and gradients."""
    with jax.enable_x64(True):
        verdicts = check_file(SHARED / "oracle" / f"{name}.npz")
    cases = [case["id"] for case in json.loads((SHARED / "oracle" / f"{name}.json").read_text())["cases"]]
    assert verdicts == dict.fromkeys(cases, "passed")


def random_pairs(count: int = 6, seed: int = 0) -> pairs.PairLogps:
    draw = np.random.default_rng(seed)
    logps, lengths = -draw.uniform(1, 20, (2, count)), draw.integers(1, 9, (2, count))
    return pairs.PairLogps(*map(jnp.float32, (*logps, *lengths)), margin=jnp.float32(draw.uniform(0.5, 2, count)))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_sigmoid_by_hand():
    policy = losses.PairLogps(jnp.array([-3.0]), jnp.array([-4.0]))
    reference = losses.PairLogps(jnp.array([-3.5]), jnp.array([-3.0]))
    margin = 0.2 * ((-3.0 + 3.5) - (-4.0 + 3.0))
    likely, unlikely = -log_sigmoid(margin), -log_sigmoid(-margin)
    np.testing.assert_allclose(losses.dpo(policy, reference, beta=0.2), [likely], rtol=1e-6)
    smooth = losses.dpo(policy, reference, beta=0.2, label_smoothing=0.1)
    np.testing.assert_allclose(smooth, [0.9 * likely + 0.1 * unlikely], rtol=1e-6)


@pytest.mark.parametrize("log_offset", [True, False])
def test_odpo_by_hand(log_offset):
    policy, reference = random_pairs(), random_pairs(seed=1)
    expected = []
    for w, l, rw, rl, margin in zip(
        policy.chosen, policy.rejected, reference.chosen, reference.rejected, policy.margin, strict=True
    ):
        shift = math.log(margin) if log_offset else float(margin)
        expected.append(-log_sigmoid(0.2 * float((w - rw) - (l - rl)) - 0.5 * shift))
    values = preference.odpo(policy, reference, beta=0.2, alpha=0.5, log_offset=log_offset)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(preference.LOSSES))
def test_pairs_do_not_affect_each_other(name):
    """One pair alone has the value it has among others, but for AOT, which sorts: there, the values are permuted."""
    loss, policy, reference = preference.LOSSES[name], random_pairs(), random_pairs(seed=1)
    together = loss(policy, reference)
    assert together.shape == (6,) and np.isfinite(together).all()
    order = np.array([3, 1, 5, 0, 2, 4])
    permuted = loss(*jax.tree.map(lambda x: x[order], (policy, reference)))
    np.testing.assert_allclose(permuted, together[order], rtol=1e-6)
    if not name.startswith("aot"):
        alone = loss(*jax.tree.map(lambda x: x[2:3], (policy, reference)))
        np.testing.assert_allclose(alone, together[2:3], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(preference.LOSSES))
def test_empty_places_affect_nothing(name):
    """A place without tokens leaves the values and gradients of the pairs as they are, and its own gradient finite."""
    policy, reference = random_pairs(), random_pairs(seed=1)
    zeros = jax.tree.map(lambda x: jnp.zeros(2, x.dtype), policy)
    longer = jax.tree.map(lambda x, empty: jnp.concatenate([empty, x]), (policy, reference), (zeros, zeros))

    def total(policy, reference, valid):
        return (jnp.where(valid, preference.LOSSES[name](policy, reference), 0.0)).sum()

    value, grads = jax.value_and_grad(total)(policy, reference, np.ones(6, bool))
    padded, padded_grads = jax.value_and_grad(total)(*longer, np.arange(8) >= 2)
    np.testing.assert_allclose(padded, value, rtol=1e-6)
    for logps in ("chosen", "rejected"):
        np.testing.assert_allclose(getattr(padded_grads, logps)[2:], getattr(grads, logps), rtol=1e-6)
        assert np.isfinite(getattr(padded_grads, logps)).all()


DIVERGENCES = {  # f'(t) - f'(1), as the paper's table 1 has f'
    "reverse_kl": math.log,
    "forward_kl": lambda t: -1 / t + 1,
    "js_divergence": lambda t: math.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (1 - t**-0.3) / 0.3,
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_by_hand(divergence):
    policy, reference = random_pairs(), random_pairs(seed=1)
    shaped = pairs.with_divergence(policy, reference, divergence=divergence, alpha=0.7)
    ratios = [math.exp(float(p - r)) for p, r in zip(policy.chosen, reference.chosen, strict=True)]
    np.testing.assert_allclose(shaped.chosen, list(map(DIVERGENCES[divergence], ratios)), rtol=1e-4)
    same = pairs.with_divergence(policy, policy, divergence=divergence, alpha=0.7)
    np.testing.assert_array_equal(same.rejected, 0)


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="divergence: 'kl', expected one of reverse_kl"):
        pairs.with_divergence(random_pairs(), None, divergence="kl")


def test_plackett_luce_is_a_distribution_over_orders():
    rewards = jnp.array([0.3, -1.0, 2.0, 0.1])
    orders = jnp.stack([rewards[jnp.array(order)] for order in itertools.permutations(range(4))])
    logps = -reward.plackett_luce(orders, jnp.ones_like(orders))
    np.testing.assert_allclose(jnp.exp(logps).sum(), 1, rtol=1e-6)
    by_hand = sum(rewards[k] - math.log(sum(math.exp(r) for r in rewards[k:])) for k in range(4))
    np.testing.assert_allclose(logps[0], by_hand, rtol=1e-6)
    pair = reward.plackett_luce(rewards[None, :2], jnp.ones((1, 2)))
    np.testing.assert_allclose(pair, reward.bradley_terry(rewards[:1], rewards[1:2]), rtol=1e-6)


@pytest.mark.parametrize("e", [0.0, 0.1])
def test_smoothed_labels_of_rewards_by_hand(e):
    """A share e of the labels is taken to be the other way; the least loss is where sigma(difference) is 1 - e."""
    chosen, rejected = jnp.array([0.3, 2.0]), jnp.array([-1.0, 0.5])
    expected = [
        -(1 - e) * log_sigmoid(float(w - l)) - e * log_sigmoid(float(l - w))
        for w, l in zip(chosen, rejected, strict=True)
    ]
    found = reward.bradley_terry(chosen, rejected, label_smoothing=e)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    as_rankings = reward.all_pairs(jnp.stack([chosen, rejected], -1), jnp.ones((2, 2)), label_smoothing=e)
    np.testing.assert_allclose(as_rankings, expected, rtol=1e-6)
    if e:
        slope = jax.grad(lambda d: reward.bradley_terry(d, 0.0, label_smoothing=e))(math.log(1 / e - 1))
        np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_all_pairs_by_a_loop():
    rewards, scores = jnp.array([0.3, -1.0, 2.0, 0.1]), jnp.array([2.0, 1.0, 1.0, 0.0])
    better = [(i, j) for i in range(4) for j in range(4) if scores[i] > scores[j]]
    assert len(better) == 5
    expected = np.mean([-log_sigmoid(float(rewards[i] - rewards[j])) for i, j in better])
    values = reward.all_pairs(rewards[None], jnp.ones((1, 4)), scores[None])
    np.testing.assert_allclose(values, [expected], rtol=1e-6)


@pytest.mark.parametrize("name", ["plackett_luce", "all_pairs"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_missing_completions_of_a_ranking(name, count):
    """They add nothing, wherever they stand; a ranking of less than two is 0, and no gradient is NaN."""
    loss, rewards = reward.LOSSES[name], jnp.array([[0.5, -0.5, 7.0]])
    mask = (jnp.arange(3) < count)[None].astype(jnp.float32)
    value, grad = jax.value_and_grad(lambda r: loss(r, mask).sum())(rewards)
    assert np.isclose(value, -log_sigmoid(1.0) if count == 2 else 0.0)
    assert np.isfinite(grad).all() and (grad[0, count:] == 0).all()


def test_top_k_bounds_the_divergence_from_below():
    """With the rest as one token: exact at k = V (less what rounding leaves), below it at fewer."""
    draw = np.random.default_rng(0)
    student, teacher = (distill.logps(jnp.float32(draw.normal(size=(4, 12)))) for _ in range(2))
    order = jnp.argsort(-teacher, axis=-1)
    whole, last = distill.forward_kl(student, teacher), 0.0
    for k in (1, 4, 11):
        top = lambda x, k=k: distill.with_rest(jnp.take_along_axis(x, order[:, :k], axis=-1))  # noqa: E731
        value = distill.forward_kl(top(student), top(teacher))
        assert (value <= whole + 1e-6).all() and (value >= last - 1e-6).all()
        last = value
    np.testing.assert_allclose(last, whole, rtol=1e-4)  # the rest is one token; 1 - sum rounds


def test_kto_without_mismatched_pairs_has_no_baseline():
    assert unpaired.kl(jnp.array([3.0]), jnp.array([1.0]), jnp.zeros(1)) == 0
