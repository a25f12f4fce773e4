"""Whole PPO runs of a tiny model: resumed anywhere, asynchronous, watched, and what bad rewards do to them."""

import contextlib
import io
import json
import pathlib
import random
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxpost
from jaxpost.cli import main
from jaxpost.errors import CheckpointError, ConfigError, ScoreError
from jaxpost.models import lora
from jaxpost.models.config import Experts, Layer
from jaxpost.ops.rope import Rope
from jaxpost.train.checkpoint import Checkpointer
from jaxpost.train.online import OnlineLoop
from jaxpost.train.rollouts import Rollouts
from tests.worlds import write_model

TIMED = {"tokens_per_second", "rollout_share"}
STEPS = 4
QUESTIONS = [{"prompt": [{"role": "user", "content": f"How many letters has {'a' * n}?"}]} for n in range(1, 9)]


def letters(question, answer, record) -> float:
    """A reward that the model can raise: by the letter e."""
    return answer.count("e") / 4


def failing(question, answer, record) -> float:
    """Raises for one question, is not finite for another, and hangs for a third."""
    asked = question[-1]["content"]
    if " aaa?" in asked:
        raise ValueError("no such letters")
    if " aaaa?" in asked:
        return float("nan")
    if " aaaaa?" in asked:
        time.sleep(60)
    return letters(question, answer, record)


def constant(question, answer, record) -> float:
    return 1.0


def falling(question, answer, record) -> float:
    return -letters(question, answer, record)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return write_model(folder / "model"), folder / "questions.jsonl"


def ppo_config(model, questions, run_dir, changes=None, **run) -> dict:
    """A PPO config of a few steps on tiny rows."""
    config = {
        "stage": "ppo",
        "model": {"path": str(model)},
        "data": {"train": str(questions), "eval_examples": 2},
        "score": {"reward": "tests.train.test_online:letters"},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 2, "max_prompt_tokens": 48},
        "sampling": {"max_new_tokens": 10, "slots": 8, "block_steps": 5, "prefill_tokens": 48},
        "kl": {"coef": 0.1, "controller": "adaptive", "target": 0.01},
        "value": {"model": "head"},
        "ppo": {"epochs": 2, "minibatches": 2},
        "batch": {"rows_per_step": 2, "tokens_per_row": 128, "documents_per_row": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "run": {"dir": str(run_dir), "steps": STEPS, "eval_prompts": 0, "log_to": (), "export": False, **run},
    }
    for name, value in (changes or {}).items():
        section, _, key = name.rpartition(".")
        (config.setdefault(section, {}) if section else config)[key] = value
    return config


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs over one of the simulated devices: what is tested here does not depend on the mesh."""
    from jaxpost.train import setup

    make = setup.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda **sizes: make(**sizes, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A run that was never stopped."""
    return jaxpost.run(ppo_config(*given, tmp_path_factory.mktemp("whole") / "run"))


def same_rows(ours, theirs):
    strip = lambda rows: [{k: v for k, v in row.items() if k not in TIMED} for row in rows]  # noqa: E731
    assert strip(ours) == strip(theirs)


def same_bits(ours, theirs):
    for a, b in zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(jax.device_get(theirs)), strict=True):
        np.testing.assert_array_equal(np.atleast_1d(a).view(np.uint8), np.atleast_1d(b).view(np.uint8))


def same_state(ours, theirs):
    """Policy, value model, moments, controller, moments of scores and counters."""
    same_bits(*((s.state.params, s.state.opt_state, s.state.carry, s.state.step) for s in (ours, theirs)))


def test_rows_of_a_run(whole):
    steps = [row for row in whole.rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    first = steps[0]
    assert first["kl"] == pytest.approx(0, abs=1e-5) and first["first/ratio_error"] < 1e-5
    assert first["first/clip_fraction"] == 0 and all(row["sampler_trainer_gap"] < 1e-4 for row in steps)
    assert steps[1]["kl"] != 0 and steps[1]["kl_coef"] != steps[0]["kl_coef"]
    assert {"reward", "value", "entropy", "length", "repetition", "no_eos", "explained_variance"} <= set(first)
    assert [row["step"] for row in whole.rows if "eval/reward" in row] == [0, STEPS]
    assert (whole.folder / "frontier.png").exists()


@contextlib.contextmanager
def crash(owner, name: str, times: int):
    """The run inside breaks off when it comes to call this method once more than so many times."""
    method, left = getattr(owner, name), [times]

    def broken(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return method(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, broken)
        yield


@pytest.mark.parametrize(
    ("owner", "name", "times"),
    [
        (Rollouts, "text", 25),  # in a rollout, some of whose prompts are journaled
        (Rollouts, "score", 3),  # all drawn, nothing scored
        (OnlineLoop, "write", 2),  # after an update
        (Checkpointer, "save", 1),
    ],
)
def test_a_run_that_breaks_off_anywhere_resumes_to_the_bit(given, whole, tmp_path, owner, name, times):
    config = ppo_config(*given, tmp_path / "run", checkpoint_every=2)
    with crash(owner, name, times):
        jaxpost.run(config)
    config["run"]["resume"] = True
    resumed = jaxpost.run(config)
    same_rows(resumed.rows, whole.rows)
    same_state(resumed, whole)


def test_what_was_drawn_is_replayed_not_repeated(given, whole, tmp_path, monkeypatch):
    config = ppo_config(*given, tmp_path / "run", checkpoint_every=2)
    with crash(OnlineLoop, "write", 3):  # the update of step 4 is lost, its rollout is not
        jaxpost.run(config)
    monkeypatch.setattr(Rollouts, "score", None)
    drawn = []
    draw = Rollouts.draw

    def counted(self, step, params, identity):
        assert step in (3, 4)
        drawn.append(step)
        return draw(self, step, params, identity)

    monkeypatch.setattr(Rollouts, "draw", counted)
    config["run"]["resume"] = True
    config["data"] = config["data"] | {"eval_examples": 2}
    resumed = jaxpost.run(config)
    assert drawn == [3, 4]
    same_state(resumed, whole)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(given, whole, tmp_path):
    """kill -9 at a random moment, again and again; then as if nothing had happened."""
    config = ppo_config(*given, tmp_path / "run", checkpoint_every=1, resume=True)
    code = f"import jaxpost\njaxpost.run({config!r})"
    draw = random.Random(time.time())
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code])
        files, target = set(), draw.randrange(1, 30)
        while process.poll() is None and len(files) < target:
            time.sleep(draw.random() * 0.05)
            files |= {(path.name, path.stat().st_size) for path in (tmp_path / "run").rglob("*.jsonl")}
        process.kill()
        process.wait()
    resumed = jaxpost.run(config)
    same_rows(resumed.rows, whole.rows)
    same_state(resumed, whole)


def test_an_asynchronous_run_is_one_update_late_and_resumes_to_the_bit(given, whole, tmp_path):
    changes = {"rollout.staleness": 1}
    late = jaxpost.run(ppo_config(*given, tmp_path / "late", changes))
    rows, before = ([row for row in run.rows if "loss" in row] for run in (late, whole))
    strip = lambda row: {k: v for k, v in row.items() if k not in TIMED | {"policy_drift", "sampler_trainer_gap"}}  # noqa: E731
    ours = {k: v for k, v in strip(rows[0]).items() if k != "importance_weight"}
    assert ours == pytest.approx(strip(before[0]), abs=1e-5)  # the first one is drawn by the weights that learn from it
    assert rows[0]["policy_drift"] < 1e-4 < rows[1]["policy_drift"]
    assert rows[0]["importance_weight"] == pytest.approx(1, abs=1e-4) != rows[1]["importance_weight"]
    config = ppo_config(*given, tmp_path / "run", changes, checkpoint_every=1)
    with crash(OnlineLoop, "write", 2):
        jaxpost.run(config)
    config["run"]["resume"] = True
    resumed = jaxpost.run(config)
    same_rows(resumed.rows, late.rows)
    same_state(resumed, late)
    for path in (tmp_path / "run" / "rollouts").glob("*"):
        path.unlink()
    config["run"]["steps"] = STEPS + 1
    with pytest.raises(CheckpointError, match=r"step-000005\.jsonl: missing or not whole; an asynchronous run goes on"):
        jaxpost.run(config)


def test_rules_end_a_run_and_name_the_last_good_checkpoint(given, tmp_path, capsys):
    changes = {
        "halt_when": ("gold < -5", "reward > 1.5x start for 1", "kl > 1e-6"),
        "warn_when": ("reward_std > 0",),
        "score.gold": "tests.train.test_online:falling",
        "optimizer.learning_rate": 1e-2,
    }
    config = ppo_config(*given, tmp_path / "run", changes, checkpoint_every=1, keep_last=9)
    run = jaxpost.run(config)
    assert not run.finished and re.search(r"step 2, halt_when 'kl > 1e-6': .*no checkpoint of it was saved", run.halted)
    assert re.search(r"checkpoints/0|there is none from before|checkpoints/1", run.halted)
    assert next(row["gold"] for row in run.rows if "gold" in row) <= 0
    assert not (tmp_path / "run/checkpoints/2").exists() and not (tmp_path / "run/export").exists()
    path = tmp_path / "config.py"
    config["run"]["dir"] = str(tmp_path / "again")
    path.write_text(f"def get_config():\n    return {config!r}\n")
    assert main(["train", f"--config={path}"]) == 3


def test_rules_about_what_is_not_logged_are_refused_at_once(given, tmp_path):
    with pytest.raises(ConfigError, match=r"halt_when: 'klo > 5': klo is not logged by this run; there are kl"):
        jaxpost.run(ppo_config(*given, tmp_path / "run", {"halt_when": ("klo > 5",)}))
    assert not (tmp_path / "run").exists()


def test_rewards_that_fail_are_counted_and_count_for_nothing(given, tmp_path):
    changes = {"score.reward": "tests.train.test_online:failing", "score.timeout_s": 1.0, "data.eval_examples": 0}
    changes["rollout.prompts_per_step"] = 8
    run = jaxpost.run(ppo_config(*given, tmp_path / "run", changes, steps=2))
    assert [row["score_failures"] for row in run.rows if "loss" in row] == [
        6.0,
        6.0,
    ]  # three questions, two answers each
    assert all(np.isfinite(list(row.values())).all() for row in run.rows)
    changes["score.on_failure"] = "stop"
    with pytest.raises(ScoreError, match=r"6 of 16 answers have no score: .*score\.on_failure='skip' goes on"):
        jaxpost.run(ppo_config(*given, tmp_path / "other", changes, steps=2))


def test_rewards_all_equal_are_warned_of(given, tmp_path, caplog):
    changes = {"score.reward": "tests.train.test_online:constant", "warn_when": ("reward_std < 1e-6 for 2",)}
    with caplog.at_level("WARNING", "jaxpost"):
        jaxpost.run(ppo_config(*given, tmp_path / "run", changes, steps=3))
    assert "step 2, warn_when 'reward_std < 1e-6 for 2'" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score.reward": None}, r"score\.reward: missing"),
        (
            {"score.reward": ["a:b", "c:d"], "score.weights": [1.0]},
            r"score\.weights: 1 for the 2 rewards of score\.reward",
        ),
        ({"sampling.max_new_tokens": 0}, r"sampling\.max_new_tokens: 0 is out of range"),
        ({"sampling.max_new_tokens": 100}, r"batch\.tokens_per_row: 128 is less than rollout\.max_prompt_tokens"),
        ({"batch.tokens_per_row": 256, "sampling.max_new_tokens": 100}, r"are more than the 128 tokens that the model"),
        ({"sampling.stop": ("",)}, r"sampling\.stop: .* expected strings that are not empty"),
        ({"sampling.engine": "http"}, r"sampling\.url: missing"),
        (
            {"sampling.engine": "http", "sampling.url": "http://x", "sampling.reload": "true", "sampling.top_p": 0.9},
            r"sampling\.top_p: 0\.9, but a server does not say how likely its draws were under filters",
        ),
        ({"lora": {"rank": 4, "dropout": 0.1}}, r"lora\.dropout: 0\.1, but what draws has none"),
        ({"score.missing_eos_score": -1.0, "score.missing_eos_penalty": 1.0}, r"score\.missing_eos_score: stands in"),
        ({"batch.accumulate": 2}, r"batch\.accumulate: 2, but as many microbatches"),
        ({"value.path": "embedded:sft"}, r"value\.path: a head on the policy"),
        ({"run.steps": None, "run.epochs": 1}, r"run\.steps: missing"),
        ({"reference.mode": "moving"}, r"reference\.mode: 'moving'"),
    ],
)
def test_what_cannot_be_is_refused_by_key(given, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        jaxpost.run(ppo_config(*given, tmp_path / "run", changes))
    assert not pathlib.Path(tmp_path / "run").exists()


def test_a_run_can_be_loaded_and_talked_to(whole):
    loaded = jaxpost.load(whole.folder)
    same_bits(loaded.params, whole.params)
    assert isinstance(loaded.chat("How many letters has aa?", 4), str)


@pytest.mark.parametrize("kind", ["head", "own"])
def test_adapters_learn_over_a_base_that_is_the_reference(given, tmp_path, monkeypatch, capsys, kind):
    """No second model is held: a value model of its own has a trunk, but that one trains."""
    held, method = [], OnlineLoop.run
    monkeypatch.setattr(OnlineLoop, "run", lambda self, *rest: held.append(self.frozen) or method(self, *rest))
    changes = {"lora": {"rank": 4, "alpha": 8.0}, "value.model": kind, "data.eval_examples": 0}
    run = jaxpost.run(ppo_config(*given, tmp_path / "run", changes, steps=2, export=True))
    assert all(row["first/ratio_error"] < 1e-5 and row["sampler_trainer_gap"] < 1e-4 for row in run.rows)
    assert run.rows[0]["kl"] == pytest.approx(0, abs=1e-5) and run.rows[1]["kl"] != 0
    (frozen,) = held
    assert set(frozen) == {"base"}
    base, adapters = lora.split(run.params)
    assert all(a is b for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(frozen["base"]), strict=True))
    same_bits(adapters, run.state.params["policy"])
    assert set(run.state.params["value"]) == ({"score"} if kind == "head" else {"score", *base} - {"head"})
    assert (run.folder / "export/adapter_config.json").exists()
    same_bits(jaxpost.load(run.folder).params, run.params)
    if kind == "head":
        monkeypatch.setattr("sys.stdin", io.StringIO("How many letters has aa?\n"))
        assert main(["chat", f"--checkpoint={run.folder}", "--max-new-tokens=4"]) == 0


@pytest.mark.slow
def test_a_mixture_of_experts_learns(given, tmp_path):
    experts = {"pattern": (Layer(Rope(), experts=True),), "experts": Experts(8, 2, 16, True, 0.01)}
    model = write_model(tmp_path / "model", family="qwen3_moe", qk_norm=True, **experts)
    run = jaxpost.run(ppo_config(model, given[1], tmp_path / "run", {"data.eval_examples": 0}, steps=2))
    assert all(row["first/ratio_error"] < 1e-5 and row["sampler_trainer_gap"] < 1e-4 for row in run.rows)
    assert all(2 <= row["loss/router"] <= 16 and 1 <= row["router/max_load"] <= 4 for row in run.rows)
    assert run.rows[1]["kl"] != 0
