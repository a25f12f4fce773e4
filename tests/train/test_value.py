"""What the value model of PPO begins from."""

import jax
import numpy as np
import pytest

from jaxpost import config as configs
from jaxpost.models import hf
from jaxpost.models.policy import Policy
from jaxpost.sharding import make_mesh
from jaxpost.train.scores import score_documents, token_documents
from jaxpost.train.setup import open_model
from jaxpost.train.value import open_value
from tests.models.tiny import linear_rows
from tests.worlds import write_model

TOKENS = np.array([1, 40, 7, 99, 12], np.int32)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(a language model, a reward model of two normalised heads)"""
    folder = tmp_path_factory.mktemp("given")
    norm = {"num_scores": 2, "score_norm": ((1.0, 2.0), (-1.0, 4.0))}
    return write_model(folder / "model"), write_model(folder / "reward", seed=1, **norm)


def opened(given, **changes):
    """(the policy's Model, its value model and the first parameters of both, mesh)"""
    values = {"stage": "ppo", "model": {"path": str(given[0])}, "data": {"train": "embedded"}, "run": {"steps": 1}}
    config = configs.resolve(values | {"score": {"reward": str(given[1])}} | changes)
    mesh = make_mesh(devices=jax.devices()[:1])
    model = open_model(config, mesh)
    return model, open_value(config, model, mesh), mesh


def test_it_begins_as_the_reward_model(given):
    """After all tokens its value is the mean of the heads in the units of their norm, but for what is constant."""
    _, value, mesh = opened(given)
    params, rows = value.load(), linear_rows([np.append(TOKENS, 3)], 8)
    values = np.asarray(value.values(params, None, rows))[0]
    policy = Policy(hf.read_config(str(given[1])))
    reward = hf.load_params(str(given[1]), policy)
    for length in (3, 5):  # the value before the next token is the score of those so far
        (score,) = score_documents(policy, reward, mesh, token_documents([TOKENS[:length]], 128)).mean
        assert values[length] - 0.5 * (1.0 / 2.0 - 1.0 / 4.0) == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("kind", ["own", "head"])
def test_a_fresh_head_says_0(given, kind):
    model, value, _ = opened(given, score={"reward": "my.module:fn"}, value={"model": kind})
    params, policy = value.load(), model.policy
    rows = linear_rows([TOKENS], 8)
    hidden, _ = policy.hidden(hf.load_params(str(given[0]), policy), rows)
    assert not np.asarray(value.values(params, hidden, rows)).any()
    assert (value.policy is None) == (kind == "head")
    if kind == "own":
        ours, theirs = params["layers"], hf.load_params(str(given[0]), policy)["layers"]
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
