"""GAE against the sum of its paper, completion by completion."""

import doctest

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops import masked
from jaxpost.rl import advantages

LENGTHS = (5, 1, 7, 3)


def test_examples_in_docstrings():
    found = doctest.testmod(advantages)
    assert found.attempted and not found.failed


def completions():
    """Rewards and values of each completion, f32 of its length."""
    draw = np.random.default_rng(0)
    return [tuple(draw.normal(size=(2, length)).astype(np.float32)) for length in LENGTHS]


def by_the_sum(rewards, values, gamma, lam):
    """Equation 16: A_t = sum_l (gamma lam)^l delta_(t+l), the value after the last token 0."""
    after = np.append(values[1:], 0.0)
    deltas = rewards + gamma * after - values
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, len(deltas))) for t in range(len(deltas))]


def padded(parts, width: int):
    """[C, width]: a completion a row, 0 after it."""
    return np.stack([np.pad(part, (0, width - len(part))) for part in parts])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_by_the_sum(gamma, lam):
    rewards, values = zip(*completions(), strict=True)
    mask = padded([np.ones(length, np.float32) for length in LENGTHS], 9)
    given = (padded(rewards, 9), padded(values, 9), mask)
    ours, returns = advantages.gae(*given[:2], masked.continues(jnp.array(mask)), gamma=gamma, lam=lam)
    for row, (reward, value) in enumerate(completions()):
        expected = by_the_sum(reward, value, gamma, lam)
        np.testing.assert_allclose(ours[row, : len(reward)], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(returns[row, : len(reward)], expected + value, rtol=1e-5, atol=1e-6)


def test_at_lambda_1_returns_are_the_rewards_to_come():
    reward, value = completions()[0]
    _, returns = advantages.gae(reward[None], value[None], masked.continues(jnp.ones((1, 5))), gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns[0], np.cumsum(reward[::-1])[::-1], rtol=1e-5)


def rewards_of_groups():
    """Rewards f64[C] and groups int[C] of 3, 1 and 4 completions, mixed; two have no reward, one alone in its group."""
    draw = np.random.default_rng(0)
    groups = draw.permutation(np.repeat([5, 9, 2, 7], [3, 1, 4, 2]))
    rewards = draw.normal(size=len(groups))
    rewards[np.flatnonzero(groups == 2)[1]] = rewards[np.flatnonzero(groups == 7)[0]] = np.nan
    return rewards, groups


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_groups_by_a_loop(scale):
    rewards, groups = rewards_of_groups()
    everything = [r for r in rewards if r == r]
    expected, without = [], []
    for reward, group in zip(rewards, groups, strict=True):
        mine = [r for r, g in zip(rewards, groups, strict=True) if g == group and r == r]
        if reward != reward:
            expected.append(0.0)
            without.append(0.0)
            continue
        spread = {"group": mine, "batch": everything}.get(scale)
        std = 1.0 if spread is None else (np.std(spread, ddof=1) if len(spread) > 1 else 0.0) + advantages.EPSILON
        expected.append((reward - np.mean(mine)) / std)
        others = (sum(mine) - reward) / (len(mine) - 1) if len(mine) > 1 else reward
        without.append(reward - others)
    np.testing.assert_allclose(advantages.group_relative(rewards, groups, scale=scale), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(advantages.leave_one_out(rewards, groups), without, rtol=1e-5, atol=1e-7)


def test_a_group_of_equals_has_no_advantage():
    for found in (advantages.group_relative([0.1] * 5, [3] * 5), advantages.leave_one_out([0.1] * 5, [3] * 5)):
        np.testing.assert_array_equal(found, 0)


def test_decoupled_rewards_do_not_drown_each_other():
    draw = np.random.default_rng(0)
    rewards, groups = draw.normal(size=(12, 2)), np.repeat([0, 1, 2], 4)
    larger = rewards * [1, 1000]
    apart = [advantages.decoupled(given, [1.0, 1.0], groups) for given in (rewards, larger)]
    np.testing.assert_allclose(*apart, atol=1e-3)
    summed = [advantages.group_relative(advantages.combined(given, [1.0, 1.0]), groups) for given in (rewards, larger)]
    assert np.abs(summed[0] - summed[1]).max() > 0.1
    np.testing.assert_allclose([apart[0].mean(), apart[0].std(ddof=1)], [0, 1], atol=1e-3)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale: 'prompt', expected group, batch or none"):
        advantages.group_relative([1.0], [0], scale="prompt")


def test_packed_rows_equal_a_completion_a_row():
    """Between completions stands a place of none (the copy of the prompt's last token), whatever it holds."""
    rows, mask = [[], []], []
    for parts in completions():
        for row, part in zip(rows, parts, strict=True):
            row.extend([99.0, *part])
        mask.extend([0.0, *np.ones(len(parts[0]))])
    rewards, values, mask = (np.float32(x)[None] for x in (*rows, mask))
    ours, returns = advantages.gae(rewards, values, masked.continues(jnp.array(mask)), gamma=0.9, lam=0.8)
    start = 1
    for reward, value in completions():
        alone = advantages.gae(reward, value, masked.continues(jnp.ones(len(reward))), gamma=0.9, lam=0.8)
        here = np.s_[0, start : start + len(reward)]
        np.testing.assert_allclose((ours[here], returns[here]), alone, rtol=1e-5, atol=1e-6)
        start += 1 + len(reward)
