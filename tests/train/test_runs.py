"""Whole runs of a tiny model: what is written, and that a stopped run goes on as if it had never stopped."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxpost
from jaxpost.errors import CheckpointError, ConfigError, UserError
from jaxpost.models.config import Experts, Layer
from jaxpost.ops.rope import Rope
from jaxpost.train.checkpoint import Checkpointer
from jaxpost.train.loop import Loop
from tests.worlds import crash_after, dpo_config, write_model, write_pairs

# Of pairs that policy and reference score alike, rounding decides which counts as right.
ACCURACIES = [f"{prefix}rewards/accuracies{end}" for prefix in ("", "eval/") for end in ("", "_low", "_high")]
TIMED = {"tokens_per_second", "data_wait_share"}  # the only values of a row that may differ between two runs


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return write_model(folder / "model"), write_pairs(folder / "pairs.jsonl")


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A run that was never stopped."""
    return jaxpost.run(dpo_config(*given, tmp_path_factory.mktemp("whole") / "run", eval_every=3))


def same_rows(ours, theirs):
    strip = lambda rows: [{k: v for k, v in row.items() if k not in TIMED} for row in rows]  # noqa: E731
    assert strip(ours) == strip(theirs)


def same_bits(ours, theirs):
    for a, b in zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(jax.device_get(theirs)), strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_rows_of_a_run(whole):
    """One row a step, evaluations in rows of their own, TRL's names, the loss of step 1 before its update."""
    steps = [row for row in whole.rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(steps[0]["loss"], np.log(2), atol=1e-5)
    names = {"loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins"}
    names |= {
        *TIMED,
        "epoch",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "mean_token_accuracy",
        "entropy",
        "num_tokens",
    }
    assert names <= set(steps[0])
    evaluations = [row for row in whole.rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    np.testing.assert_allclose(evaluations[0]["eval/loss"], np.log(2), atol=1e-5)
    assert whole.metrics["loss"].shape == (6, 2)
    assert json.loads((whole.folder / "config.json").read_text())["optimizer"]["learning_rate"] == 1e-3


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_crashed_run_resumes_to_the_bit(given, whole, tmp_path, stop_after):
    config = dpo_config(*given, tmp_path / "run", eval_every=3, checkpoint_every=2)
    with crash_after(stop_after):
        jaxpost.run(config)
    config["run"]["resume"] = True
    resumed = jaxpost.run(config)
    same_rows(resumed.rows, whole.rows)
    same_bits(resumed.params, whole.params)


def test_sigterm_saves_and_the_run_goes_on(given, whole, tmp_path, monkeypatch):
    config = dpo_config(*given, tmp_path / "run", eval_every=3)
    write = Loop.write

    def preempted(self, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "write", preempted)
        stopped = jaxpost.run(config)
    assert not stopped.finished and int(stopped.state.step) < 6
    config["run"]["resume"] = True
    resumed = jaxpost.run(config)
    assert resumed.finished
    same_rows(resumed.rows, whole.rows)
    same_bits(resumed.params, whole.params)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(given, whole, tmp_path):
    """kill -9 at a random moment, again and again, until the run ends; then as if nothing had happened."""
    config = dpo_config(*given, tmp_path / "run", eval_every=3, checkpoint_every=1, resume=True)
    code = f"import jaxpost\nfrom ml_collections import ConfigDict\njaxpost.run(ConfigDict({config!r}))"
    draw = random.Random(time.time())
    log = tmp_path / "run" / "metrics.jsonl"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code])
        rows, target = 0, draw.randrange(1, 7)
        while process.poll() is None and rows < target:
            time.sleep(draw.random() * 0.05)
            rows = log.read_text().count('"loss"') if log.exists() else 0
        process.kill()
        process.wait()
    resumed = jaxpost.run(config)
    same_rows(resumed.rows, whole.rows)
    same_bits(resumed.params, whole.params)


def test_resume_refuses_another_config_by_key(given, whole, tmp_path):
    config = dpo_config(*given, whole.folder, eval_every=3)
    folder = pathlib.Path(whole.folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"run\.dir: .* already holds a run; set run\.resume=True"):
        jaxpost.run(config)
    config["run"]["resume"] = True
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.5 differs from the 0\.001 of the run in"):
        jaxpost.run(config | {"optimizer": {"learning_rate": 0.5, "warmup_steps": 1}})
    with pytest.raises(ConfigError, match=r"run\.steps: 2 is less than the 6"):
        jaxpost.run(config | {"run": config["run"] | {"steps": 2}})
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(given, tmp_path, caplog):
    config = dpo_config(*given, tmp_path / "run", steps=1, resume=True, profile=(1, 1))
    config["optimizer"]["warmup_steps"] = 0
    with caplog.at_level("WARNING", "jaxpost"):
        run = jaxpost.run(config)
    assert int(run.state.step) == 1 and "starting afresh" in caplog.text
    assert [path for path in pathlib.Path(run.folder / "profile").rglob("*") if path.is_file()]  # a trace of step 1


def test_live_reference_equals_cached(given, whole, tmp_path):
    config = dpo_config(*given, tmp_path / "run", eval_every=3) | {"reference": {"mode": "live"}}
    live = jaxpost.run(config)
    for ours, theirs in zip(live.rows, whole.rows, strict=True):
        for name in theirs.keys() - {*TIMED, *ACCURACIES}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_non_finite_gradients_stop_the_run(given, tmp_path):
    config = dpo_config(*given, tmp_path / "run") | {"loss": {"name": "tests.train.test_runs:nan_loss"}}
    config["optimizer"]["max_bad_steps"] = 2
    with pytest.raises(UserError, match=r"optimizer\.max_bad_steps: 2 steps in a row up to step 2"):
        jaxpost.run(config)


def nan_loss(policy, reference):
    """A loss named by dotted path whose gradient is never finite."""
    return (policy.chosen - reference.chosen) * np.nan


def test_a_finished_run_can_be_loaded_and_exported(whole, tmp_path):
    loaded = jaxpost.load(whole.folder)
    same_bits(loaded.params, whole.params)
    loaded.export(tmp_path / "export")
    again = jaxpost.load(tmp_path / "export")
    same_bits(again.params, whole.params)
    assert isinstance(again.chat("What is the capital of France?", max_new_tokens=4), str)
    with pytest.raises(CheckpointError, match="no such folder"):
        jaxpost.load(tmp_path / "nowhere")


def test_the_best_checkpoint_by_evaluation_loss_is_kept(whole):
    with Checkpointer(whole.folder / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best() in checkpoints.steps() and checkpoints.latest() == 6


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A Qwen 3 with mixtures of experts in both layers."""
    changes = {"family": "qwen3_moe", "qk_norm": True, "pattern": (Layer(Rope(), experts=True),)}
    return write_model(tmp_path_factory.mktemp("moe") / "model", **changes, experts=Experts(8, 2, 16, True, 0.01))


def test_experts_train_over_an_expert_mesh_and_log_their_load(given, experts, tmp_path):
    config = dpo_config(experts, given[1], tmp_path / "run", export=True)
    config["mesh"] = {"fsdp": 2, "expert": 4}
    config["model"]["balance_loss"] = 0.5
    config["run"]["steps"] = 2
    run = jaxpost.run(config)
    first = run.rows[0] if "loss" in run.rows[0] else run.rows[1]
    np.testing.assert_allclose(first["loss/sigmoid"], np.log(2), atol=1e-5)
    assert 2 <= first["loss/router"] <= 16  # k where the load is even, E * k where one expert has all
    np.testing.assert_allclose(first["loss"], first["loss/sigmoid"] + 0.5 * first["loss/router"], rtol=1e-5)
    assert 1 <= first["router/max_load"] <= 4
    exported = json.loads((tmp_path / "run/export/config.json").read_text())
    assert exported["model_type"] == "qwen3_moe"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"balance_loss": 0.1}}, "model.balance_loss: 0.1, but a model of the family llama has no experts"),
        ({"mesh": {"expert": 8, "fsdp": 1}}, "mesh.expert: 8, but a model of the family llama has no experts"),
    ],
)
def test_keys_for_experts_that_are_not_there(given, tmp_path, change, words):
    config = dpo_config(*given, tmp_path / "run")
    for section, values in change.items():
        config.setdefault(section, {}).update(values)
    with pytest.raises(ConfigError, match=re.escape(words)):
        jaxpost.run(config)


def test_a_reward_model_is_no_policy(given, tmp_path):
    model = write_model(tmp_path / "scores", num_scores=1)
    with pytest.raises(ConfigError, match=r"model\.path: a model with 1 scores for a head; dpo trains words"):
        jaxpost.run(dpo_config(model, given[1], tmp_path / "run"))


def test_a_run_of_other_devices_loads(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    values = json.loads((tmp_path / "run/config.json").read_text())
    values["mesh"] = {"data": 2, "fsdp": 8, "tensor": 1, "expert": 1}
    values["batch"]["rows_per_step"] = 16
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    same_bits(jaxpost.load(tmp_path / "run").params, whole.params)
