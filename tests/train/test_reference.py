"""References: moving ones against a loop, and everything that the key of cached values has to notice."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpost
from jaxpost import config as configs
from jaxpost.data.values import ValueStore
from jaxpost.errors import ConfigError
from jaxpost.train import reference
from jaxpost.train.optimizer import skip_non_finite
from jaxpost.train.setup import open_data, open_mesh, open_model
from jaxpost.train.step import make_train_step
from jaxpost.types import Batch, Mean, Rows, Term, TrainState
from tests.train.test_runs import same_bits, same_rows
from tests.worlds import crash_after, dpo_config, write_model, write_pairs


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return write_model(folder / "model"), write_pairs(folder / "pairs.jsonl")


# ---- moving ----


def one_row(value: float) -> Batch:
    tokens = np.zeros((1, 1), np.int32)
    return Batch(Rows(tokens, tokens, tokens, tokens, np.full((1, 1), value, np.float32)), {}, {}, tokens)


@pytest.mark.parametrize("alpha, every", [(1.0, 3), (0.25, 1), (0.5, 2)])
def test_a_moving_reference_equals_a_loop_and_skipped_steps_do_not_count(alpha, every):
    def objective(params, frozen, carry, batch, key):
        return {"x": Term(1.0, Mean((params["w"] * batch.rows.weights[0]).sum(), jnp.float32(1)))}, {}

    def advance(*arguments):
        return reference.follow(*arguments, alpha=alpha, every=every)

    optimizer = skip_non_finite(optax.sgd(1.0))
    params = {"w": jnp.array([1.0, -2.0])}
    carry = {"reference": {"w": jnp.array([4.0, 8.0])}, "other": jnp.float32(3)}
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0), carry)
    step = jax.jit(make_train_step(objective, optimizer, advance=advance))
    w, ref, applied = np.array([1.0, -2.0]), np.array([4.0, 8.0]), 0
    for value in (0.5, np.nan, -1.0, 2.0, np.inf, 0.25, 1.0):
        state, _ = step(state, None, one_row(value))
        if np.isfinite(value):
            w, applied = w - value, applied + 1
            ref = alpha * w + (1 - alpha) * ref if applied % every == 0 else ref
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)
        np.testing.assert_allclose(state.carry["reference"]["w"], ref, rtol=1e-6)
    assert applied == 5 and state.carry["other"] == 3


def moving(given, run_dir, alpha, every, **run) -> dict:
    return dpo_config(*given, run_dir, **run) | {"reference": {"mode": "moving", "alpha": alpha, "every": every}}


def test_a_reference_that_is_copied_after_every_update_is_the_policy(given, tmp_path):
    """It begins as another checkpoint; from then on the loss is ln 2, in training and evaluation."""
    config = moving(given, tmp_path / "run", 1.0, 1, steps=3, eval_every=2)
    config["reference"]["path"] = str(write_model(tmp_path / "other", seed=1))
    run = jaxpost.run(config)
    losses = [row[name] for row in run.rows for name in ("loss", "eval/loss") if name in row]
    assert len(losses) == 6 and min(abs(loss - np.log(2)) for loss in losses[:2]) > 1e-3
    np.testing.assert_allclose(losses[2:], np.log(2), atol=1e-5)
    same_bits(run.state.carry["reference"], run.params)
    assert run.rows[-1]["eval/logps/chosen"] != run.rows[0]["eval/logps/chosen"]


def test_a_moving_reference_resumes_to_the_bit_sharded_and_in_its_type(given, tmp_path):
    """Stopped between two of its steps, and in evaluations the reference of that time."""
    changes = {"precision": {"reference": "bfloat16"}, "mesh": {"fsdp": 4, "tensor": 2}}
    options = {"steps": 5, "eval_every": 2, "checkpoint_every": 3}
    whole = jaxpost.run(moving(given, tmp_path / "whole", 0.5, 2, **options) | changes)
    config = moving(given, tmp_path / "run", 0.5, 2, **options) | changes
    with crash_after(4):
        jaxpost.run(config)
    config["run"]["resume"] = True
    resumed = jaxpost.run(config)
    same_rows(resumed.rows, whole.rows)
    same_bits((resumed.params, resumed.state.carry), (whole.params, whole.state.carry))
    for ours, param in zip(jax.tree.leaves(whole.state.carry), jax.tree.leaves(whole.params), strict=True):
        assert ours.dtype == jnp.bfloat16 and ours.sharding.is_equivalent_to(param.sharding, param.ndim)
    losses = [row["loss"] for row in whole.rows if "loss" in row]
    np.testing.assert_allclose(losses[0], np.log(2), atol=0.02)  # the reference is rounded to bfloat16


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"every": 6}, r"reference\.every: 6 updates, but the run has 6: the reference would never move"),
        ({"path": "small", "every": 2}, r"reference\.path: has other parameters than model\.path"),
    ],
)
def test_a_reference_that_cannot_move_is_an_error(given, tmp_path, settings, words):
    if "path" in settings:
        settings = settings | {"path": str(write_model(tmp_path / "small", num_layers=1))}
    with pytest.raises(ConfigError, match=words):
        attached(dpo_config(*given, tmp_path / "run") | {"reference": {"mode": "moving"} | settings})


def test_small_steps_in_bfloat16_are_warned_of(given, tmp_path, caplog):
    config = moving(given, tmp_path / "run", 0.01, 1) | {"precision": {"reference": "bfloat16"}}
    with caplog.at_level("WARNING", "jaxpost"):
        attached(config)
    assert "reference.alpha=0.01: in bfloat16 differences of less than 20 % of a weight never reach" in caplog.text


def attached(config: dict):
    """(data, Reference), as a DPO run has them before it trains."""
    resolved = configs.resolve(config)
    mesh = open_mesh(resolved)
    model = open_model(resolved, mesh)
    return reference.attach_reference(resolved, model, mesh, open_data(resolved, model, "preference"), 64)


# ---- cached ----


@pytest.fixture
def computed(monkeypatch):
    """The number of documents of every pass that was made."""
    found = []

    def compute(documents, *rest):
        found.append(len(documents))
        store = ValueStore.for_documents(documents)
        for index, document in enumerate(documents):
            store[index] = [np.zeros(len(completion)) for completion in document.completions]
        return store

    monkeypatch.setattr(reference, "compute_logps", compute)
    return found


def retokenise(folder):
    """The last two of the vocabulary change places."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"][-2:] = values["model"]["vocab"][:-3:-1]
    (folder / "tokenizer.json").write_text(json.dumps(values))


def rewrite(path, change):
    path.write_text(change(path.read_text()))


def reshape_config(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 5e5}))


TEMPLATE = "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
CHANGES = {
    "weights": lambda c, tmp: write_model(tmp / "model", seed=1),
    "architecture": lambda c, tmp: reshape_config(tmp / "model"),
    "tokenizer": lambda c, tmp: retokenise(tmp / "model"),
    "compute type": lambda c, tmp: c.update(precision={"compute": "bfloat16", "reference": "float32"}),
    "type of the weights": lambda c, tmp: c.update(precision={"reference": "bfloat16"}),
    "data": lambda c, tmp: rewrite(tmp / "pairs.jsonl", lambda text: text.replace(" is ", " was ")),
    "order of the data": lambda c, tmp: rewrite(tmp / "pairs.jsonl", lambda t: "\n".join(t.splitlines()[::-1])),
    "template": lambda c, tmp: c.update(tokenizer={"template": str(tmp / "template.jinja")}),
    "truncation": lambda c, tmp: c["data"].update(max_tokens=24, on_long="truncate"),
    "held-out share": lambda c, tmp: c["data"].update(eval_examples=11),
    "held-out draw": lambda c, tmp: c["run"].update(seed=5),
}


@pytest.mark.parametrize("what", CHANGES)
def test_cached_values_are_computed_again_when_what_they_depend_on_changes(what, given, tmp_path, computed):
    for path in given:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    config = dpo_config(tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "run")
    config["reference"] = {"cache_dir": str(tmp_path / "cache")}
    config["data"] |= {
        "allow": ["prompt_not_prefix", "no_end_trained", "end_does_not_stop", "completion_lost"],
        "max_dropped": 1.0,
    }
    attached(config)
    assert len(computed) == 2  # documents to train on, and held-out ones
    attached(config)
    assert len(computed) == 2
    CHANGES[what](config, tmp_path)
    attached(config)
    assert len(computed) == 4


def test_cached_values_are_computed_again_by_another_version(given, tmp_path, computed, monkeypatch):
    config = dpo_config(*given, tmp_path / "run") | {"reference": {"cache_dir": str(tmp_path / "cache")}}
    attached(config)
    for name, value in (("VERSION", reference.VERSION + 1), ("__version__", "x")):
        monkeypatch.setattr(reference, name, value)
        before = len(computed)
        attached(config)
        assert len(computed) == before + 2


def test_what_does_not_change_the_values_does_not_cost_them(given, tmp_path, computed):
    config = dpo_config(*given, tmp_path / "run") | {"reference": {"cache_dir": str(tmp_path / "cache")}}
    attached(config)
    config["optimizer"]["learning_rate"] = 1e-5
    config["loss"] = {"beta": 0.3}
    config["batch"] |= {"rows_per_step": 16, "tokens_per_row": 128}
    config["mesh"] = {"data": 2, "fsdp": 4}
    config["reference"]["path"] = str(given[0])  # by another name, the same weights
    attached(config)
    assert len(computed) == 2
