"""PPO runs whose completions a server draws: by weights that reach it each step, and when it is gone."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

import jaxpost
from jaxpost.cli import main
from jaxpost.models import hf
from jaxpost.models.policy import Policy
from jaxpost.train.run import load_model
from tests.models.tiny import linear_rows
from tests.sampling.server import Server
from tests.train.test_online import QUESTIONS, one_device, ppo_config, same_rows, same_state  # noqa: F401
from tests.worlds import write_model

STEPS = 3
WIDTH = 64  # tokens of the longest prompt and completion


@functools.partial(jax.jit, static_argnums=0)
def last_logits(policy, params, rows, place):
    hidden, _ = policy.hidden(params, rows)
    return hidden[0, place] @ policy.head(params).weight.T


class ModelServer(Server):
    """A server whose model is that of the exported folder which it was told to read last; loads: all of these."""

    def __init__(self, **settings):
        super().__init__()
        self.context, self.logits, self.load = 128, self.of_model, self.read
        self.loads = []
        for name, value in settings.items():
            setattr(self, name, value)

    def read(self, folder):
        folder = pathlib.Path(folder)
        assert folder.is_absolute() and load_model(str(folder), weights=False).model.tokenizer.stop_ids  # a whole model
        assert len(list(folder.parent.iterdir())) <= 2  # this one and the one before
        policy = Policy(hf.read_config(str(folder)))
        self.policy, self.params = policy, hf.load_params(str(folder), policy)
        self.loads.append(folder)

    def of_model(self, tokens):
        place = len(tokens) - 1
        return np.asarray(last_logits(self.policy, self.params, linear_rows([np.array(tokens)], WIDTH), place), float)

    def seeds(self) -> list[int]:
        return [body["seed"] for body in self.requests if "seed" in body]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return write_model(folder / "model"), folder / "questions.jsonl"


def http_config(given, server, run_dir, changes=None, **run) -> dict:
    asked = {"engine": "http", "url": server.url, "reload": f"{server.url}/update_weights_from_disk", "retries": 1}
    asked |= {"max_new_tokens": 10, "concurrency": 1}
    changes = {"sampling": asked, **(changes or {})}
    return ppo_config(*given, run_dir, changes, **{"steps": STEPS, **run})


def train_rows(run):
    return [row for row in run.rows if "loss" in row]


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """(a run whose server was always there, what that server saw)."""
    with ModelServer() as server:
        return jaxpost.run(http_config(given, server, tmp_path_factory.mktemp("whole") / "run")), server


def test_the_server_draws_by_the_weights_that_learn(whole):
    run, server = whole
    rows = train_rows(run)
    assert len(rows) == STEPS and all(row["sampler_trainer_gap"] < 1e-4 for row in rows)
    assert rows[0]["first/ratio_error"] < 1e-5 and rows[0]["importance_weight"] == pytest.approx(1, abs=1e-4)
    assert rows[-1]["kl"] != 0
    counts = []  # completions by each of the weights
    for body in server.requests:
        if "seed" in body:
            counts[-1] += 1
        else:
            counts.append(0)
    assert counts == [2 + 8, 8, 8, 2]  # held-out answers before and after
    assert len(set(server.loads)) == STEPS + 1
    assert list((run.folder / "served").iterdir()) == server.loads[-1:]
    for ours, theirs in zip(jax.tree.leaves(run.params), jax.tree.leaves(server.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_adapters_reach_the_server_worked_into_the_base(given, tmp_path):
    changes = {"lora": {"rank": 4, "alpha": 8.0}, "data.eval_examples": 0, "optimizer.learning_rate": 1e-2}
    with ModelServer() as server:
        run = jaxpost.run(http_config(given, server, tmp_path / "run", changes, steps=2))
    assert len(server.loads) == 2  # by the base, by the first update
    assert all(row["sampler_trainer_gap"] < 1e-4 for row in train_rows(run)) and train_rows(run)[1]["kl"] > 1e-4


def died(given, tmp_path, last: int, changes=None, **run):
    """The config of a run whose server went away after so many completions; it was started from the command line."""
    with ModelServer(last=last) as server:
        config = http_config(given, server, tmp_path / "run", changes, **run)
        path = tmp_path / "config.py"
        path.write_text(f"def get_config():\n    return {config!r}\n")
        assert main(["train", f"--config={path}"]) == 2
    return config


def go_on(config):
    """(the run with its server back at another place, the seeds that this one was asked for)."""
    with ModelServer() as server:
        asked = {"url": server.url, "reload": f"{server.url}/update_weights_from_disk"}
        config = config | {"sampling": config["sampling"] | asked, "run": config["run"] | {"resume": True}}
        return jaxpost.run(config), server.seeds()


def journal(config, step: int) -> list[dict]:
    text = (pathlib.Path(config["run"]["dir"]) / f"rollouts/step-{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_server_that_goes_away_ends_the_run_and_nothing_is_lost(given, whole, tmp_path, capsys, caplog):
    run, server = whole
    config = died(given, tmp_path, last=2 + 8 + 5)  # in step 2, two of whose four prompts have both completions
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: http://127.0.0.1") and error.endswith("given up after 2 tries")
    assert f"saved at step 1; go on with run.resume=True run.dir={tmp_path / 'run'}" in caplog.text
    assert (tmp_path / "run/checkpoints/1").exists()
    places = [line["place"] for line in journal(config, 2) if "place" in line]
    assert len(places) == 2 and "scores" in journal(config, 1)[-1]
    resumed, asked = go_on(config)
    same_rows(resumed.rows, run.rows)
    same_state(resumed, run)
    assert asked == server.seeds()[2 + 8 + 4 :]  # of step 2 what was missing, and what follows


def test_an_asynchronous_run_goes_on_too(given, tmp_path):
    changes = {"rollout.staleness": 1, "data.eval_examples": 0}
    with ModelServer() as server:
        late = jaxpost.run(http_config(given, server, tmp_path / "late", changes))
        assert len(server.loads) == 2  # steps 1 and 2 are drawn by the first weights, step 3 by those of one update
    drift = [row["policy_drift"] for row in train_rows(late)]
    assert drift[0] < 1e-4 < drift[1] and drift[2] > 1e-4
    config = died(given, tmp_path, last=2 * 8 + 3, changes=changes, checkpoint_every=1)
    resumed, asked = go_on(config)
    same_rows(resumed.rows, late.rows)
    same_state(resumed, late)
    assert len(asked) == 8 - 2
