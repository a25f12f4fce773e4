"""Rules against synthetic histories: a reward that is gamed, honest runs with noise, and what is no rule."""

import itertools
import math

import numpy as np
import pytest

from jaxpost.errors import ConfigError, UserError
from jaxpost.train import watch

GAMED = "gold falls while reward rises over 20"


def run(rows, halt_when=(), warn_when=(), **given):
    """All alarms of a run whose rows are {metric: value}, from step 1 on."""
    watched = watch.Watch(halt_when, warn_when, **given)
    return [alarm for step, row in enumerate(rows, 1) for alarm in watched.check({"step": step, **row})]


def series(name, values):
    return [{name: value} for value in values]


def history(reward, gold, steps: int = 300, noise: float = 0.1, seed: int = 0):
    """Rows of a run whose reward and gold score follow two functions of the step, with noise."""
    draw = np.random.default_rng(seed)
    return [
        {"reward": reward(t) + noise * draw.normal(), "gold": gold(t) + noise * draw.normal()} for t in range(steps)
    ]


def rising(t):
    return 1 - math.exp(-t / 60)


def test_a_gamed_reward_is_found_soon_after_gold_turns():
    def gold(t):
        return rising(min(t, 100)) - 0.02 * max(0, t - 100)

    for seed in range(10):
        (alarm, *_) = run(history(lambda t: rising(t) + 0.02 * max(0, t - 100), gold, seed=seed), [GAMED])
        assert 100 < alarm.step < 140 and alarm.action == "halt"
        assert alarm.good == alarm.step - 19  # the first of the window
        assert "gold fell from" in alarm.message and "reward rose from" in alarm.message


@pytest.mark.parametrize(
    "reward, gold, most",
    [
        (rising, rising, 0),  # both rise, then neither
        (lambda t: 0.0, lambda t: 0.0, 0),  # nothing is learnt
        (lambda t: -rising(t), lambda t: -rising(t), 0),  # both fall: bad, but not this
        (lambda t: 0.01 * t, lambda t: 0.0, 3),  # gold without trend for 300 steps: one window in 1000 looks like one
    ],
)
def test_honest_runs_with_noise_raise_no_alarm(reward, gold, most):
    found = sum(bool(run(history(reward, gold, seed=seed), [GAMED])) for seed in range(20))
    assert found <= most


def test_one_odd_step_is_no_trend():
    gold = [1.0 + 0.001 * t for t in range(40)]
    gold[-1] = -50.0
    assert run([{"reward": t, "gold": g} for t, g in enumerate(gold)], [GAMED]) == []


def test_a_trend_alone():
    falling = series("entropy", np.linspace(2.0, 1.0, 30))
    (alarm,) = run(falling, warn_when=["entropy falls over 10"])
    assert (alarm.step, alarm.good, alarm.action) == (10, 1, "warn")
    assert run(falling, ["entropy rises over 10"]) == []


def test_gold_that_is_logged_now_and_then_counts_where_it_is():
    """Evaluations are rows of their own, at the step of a training row."""
    watched, alarms = watch.Watch(["eval/gold falls while reward rises over 7"]), []
    for step in range(1, 71):
        alarms += watched.check({"step": step, "reward": 0.1 * step})
        if step % 10 == 0:
            alarms += watched.check({"step": step, "eval/gold": -0.1 * step})
    assert [(alarm.step, alarm.good) for alarm in alarms] == [(70, 10)]


def test_kendall_by_a_loop():
    draw = np.random.default_rng(0)
    values = draw.normal(size=12).round(1)
    score = sum(np.sign(b - a) for a, b in itertools.combinations(values, 2))
    # the standard deviation over all orders of values without ties, here by drawing them
    spread = np.std([watch.kendall(draw.permutation(12.0 + np.arange(12))) for _ in range(4000)])
    assert watch.kendall(values) == pytest.approx(score / math.sqrt(12 * 11 * 29 / 18))
    assert spread == pytest.approx(1, abs=0.05)
    assert watch.kendall(np.arange(watch.FEWEST_ROWS)) > watch.SIGNIFICANT > watch.kendall(np.arange(6))


def test_bounds():
    rows = series("kl", [0.1, 0.6, 0.1, 0.7, 0.8, 0.9])
    found = [(a.step, a.good) for a in run(rows, ["kl > 0.5"])]
    assert found == [(2, 1), (4, 3)]  # once each time it comes to hold
    assert [(a.step, a.good) for a in run(rows, ["kl > 0.5 for 3"])] == [(6, 3)]
    assert [(a.step, a.good) for a in run(rows, ["kl<0.5"])] == [(1, 0), (3, 2)]
    (alarm,) = run(rows, ["kl > 0.85"])
    assert str(alarm) == "step 6, halt_when 'kl > 0.85': kl is 0.9, above 0.85"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_beyond_any_bound(value):
    for rule in ("kl > 0.5", "kl < -1"):
        (alarm,) = run(series("kl", [0.1, value]), [rule])
        assert alarm.step == 2
    assert run(series("kl", [1, 2, 3, value, 4, 5, 6, 7]), ["kl rises over 7"])[0].good == 1


def test_a_multiple_of_the_start():
    rows = series("length", [90, 110, 100, 150, 199, 201, 400])
    (alarm,) = run(rows, ["length > 2x start"])
    assert alarm.step == 6 and alarm.message == "length is 201, above 200 (2x its start)"
    assert run(series("entropy", [2, 2, 2, 1, 0.5]), ["entropy < 0.3x start"])[0].step == 5
    with pytest.raises(UserError, match=r"halt_when: 'kl > 2x start': kl started at -1, .* set a number"):
        run(series("kl", [-1, -1, -1]), ["kl > 2x start"])


def test_equal_rewards_warn():
    rows = series("reward_std", [0.5, 0, 0, 0.1, 0, 0, 0, 0])
    (alarm,) = run(rows, warn_when=["reward_std < 1e-6 for 3"])
    assert (alarm.step, alarm.good, alarm.action) == (7, 4, "warn")


def test_a_resumed_run_judges_as_one_never_stopped():
    rows = history(lambda t: 0.01 * t, lambda t: -0.01 * t, steps=60)
    rules = [GAMED, "reward > 1.2x start for 2"]
    whole = watch.Watch(rules)
    said = [whole.check({"step": step, **row}) for step, row in enumerate(rows, 1)]
    assert any(said)
    for stop in (1, 19, 20, 40):
        again = watch.Watch(rules)
        for step, row in enumerate(rows[:stop], 1):
            again.check({"step": step, **row})
        assert [again.check({"step": step, **row}) for step, row in enumerate(rows[stop:], stop + 1)] == said[stop:]


def test_the_last_good_checkpoint_is_from_before_the_trouble():
    """The row of step 8 is of the policy of checkpoint 7: with step 9 bad and 8 well, that of 8 is not known good."""
    (alarm,) = run(series("kl", [0.1] * 8 + [0.9]), ["kl > 0.5"])
    assert alarm.good == 8
    assert watch.last_good([2, 4, 6, 8], [alarm]) == 6
    assert watch.last_good([7, 8], [alarm]) == 7
    assert watch.last_good([8], [alarm]) is None


@pytest.mark.parametrize(
    "text, says",
    [
        ("kl", "'kl' is no rule; expected one like 'kl > 0.5'"),
        ("kl > much", "is no rule"),
        ("kl > nan", "is no rule"),
        ("kl = 0.5", "is no rule"),
        ("kl > 0.5 for", "is no rule"),
        ("gold falls while reward rises", "is no rule"),
        ("gold drops over 20", "is no rule"),
        ("kl > 0.5 for 0", "for 0 is out of range; expected at least 1 step"),
        ("kl > -2x start", "-2 is out of range; expected a factor above 0"),
        ("gold falls over 6", "over 6 is too short; a trend needs at least 7 steps"),
        ("gold falls while gold rises over 9", "expected two metrics, got gold twice"),
    ],
)
def test_what_is_no_rule_is_refused(text, says):
    for key in ("halt_when", "warn_when"):
        with pytest.raises(ConfigError) as error:
            watch.Watch(**{"halt_when": (), key: [text]})
        assert str(error.value).startswith(f"{key}: {text!r}") and says in str(error.value)


def test_a_metric_that_is_not_logged_is_named_with_its_like():
    with pytest.raises(ConfigError, match="halt_when: 'kk > 1': kk is not logged by this run; there are kl"):
        watch.Watch(["kk > 1"], known={"kl", "reward"})
    assert watch.Watch(["kl > 1"], known={"kl", "reward"})
