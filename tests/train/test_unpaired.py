"""The objective of single completions against loops, what BCO remembers, and whole runs on ratings and on pairs."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpost
from jaxpost import config as configs
from jaxpost.data.rows import build_batch
from jaxpost.errors import DataError
from jaxpost.losses import unpaired
from jaxpost.sharding import batch_sharding, make_mesh
from jaxpost.train.objectives import bind_loss
from jaxpost.train.step import Carry, join, make_train_step
from jaxpost.train.unpaired import add_rewards, unpaired_objective
from jaxpost.types import Document, Mean, Origin, TrainState
from tests.train.test_preference import Given
from tests.worlds import dpo_config, write_model, write_pairs

BETA = 0.4


def rated(rng, index, mismatched=True):
    """A rated answer, and all but sometimes one to another prompt."""
    lengths = rng.integers(2, 8, 2 if mismatched and index != 3 else 1)
    draw = lambda n: rng.integers(1, 40, n).astype(np.int32)  # noqa: E731
    parts = tuple(map(draw, lengths))
    reference = tuple(-rng.random(n).astype(np.float32) for n in lengths)
    label = (float(index % 3 == 0), 0.0)[: len(lengths)]
    weights = tuple(np.ones(n, np.float32) for n in lengths)
    origin, token = Origin("ratings", index + 1), {"reference_logps": reference}
    return Document(draw(4), parts, weights, index, origin, token, {"label": label})


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [rated(rng, index) for index in range(9)]


def batch_of(documents):
    rows = [documents[:3], documents[3:4], documents[4:7], documents[7:]]
    return build_batch(rows, rows_per_step=8, tokens_per_row=64, documents_per_row=3, branches=2)


@pytest.fixture(scope="module")
def batch(documents):
    return batch_of(documents)


@pytest.fixture(scope="module")
def params(batch):
    logps = -np.random.default_rng(1).random(batch.rows.tokens.shape).astype(np.float32)
    return {"logps": logps, "log_sum_sq_probs": logps}


def objective_of(name, **hyperparameters):
    return unpaired_objective(Given(), name, functools.partial(unpaired.LOSSES[name], **hyperparameters), chunk=8)


def ratios(params, batch, branch):
    """{example: log-ratio} of the completions of a branch, by a loop."""
    rows, found = batch.rows, {}
    for b, t in np.ndindex(*rows.tokens.shape):
        if rows.weights[b, t] and rows.branches[b, t] == branch:
            example = int(batch.example_ids[b, rows.segments[b, t] - 1])
            found[example] = found.get(example, 0.0) + params["logps"][b, t] - batch.token["reference_logps"][b, t]
    return found


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_kto_by_a_loop(params, batch, documents):
    """z_0 comes from the mismatched answers, where there is one; metrics tell good from bad."""
    own, other = ratios(params, batch, 1), ratios(params, batch, 2)
    assert len(own) == 9 and len(other) == 8
    z = max(0.0, float(np.mean(list(other.values()))))
    good = [documents[i].completion["label"][0] for i in range(9)]
    values = [
        1.5 * (1 - sigmoid(BETA * (own[i] - z))) if good[i] else 1 - sigmoid(BETA * (z - own[i])) for i in range(9)
    ]
    objective = jax.jit(objective_of("kto", beta=BETA, desirable_weight=1.5))
    terms, metrics = objective(params, None, None, batch, None)
    np.testing.assert_allclose(terms["kto"].mean.value, np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"].value, z, rtol=1e-5)
    rewards = [BETA * own[i] for i in range(9) if good[i]]
    np.testing.assert_allclose(metrics["rewards/chosen"].value, np.mean(rewards), rtol=1e-5)
    assert metrics["rewards/chosen"].weight == 3 and metrics["rewards/rejected"].weight == 6
    tokens = sum(len(d.completions[0]) for d in documents)
    assert metrics["entropy"].weight == tokens  # not of the answers to other prompts


def test_eight_devices_estimate_one_divergence(params, batch):
    """z_0 is the mean over the microbatch of all devices, not each device's own."""
    mesh = make_mesh(data=8, fsdp=1)
    objective = jax.jit(objective_of("kto", beta=BETA))
    alone = objective(params, None, None, batch, None)
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, batch), batch_sharding(mesh))
        spread = objective(placed[0], None, None, placed[1], None)
    assert float(alone[1]["kl"].value) > 0
    np.testing.assert_allclose(spread[1]["kl"].value, alone[1]["kl"].value, rtol=1e-5)
    np.testing.assert_allclose(spread[0]["kto"].mean.value, alone[0]["kto"].mean.value, rtol=1e-5)


def test_no_gradient_comes_from_the_mismatched(params, batch):
    def total(params):
        terms, _ = objective_of("kto")(params, None, None, batch, None)
        return terms["kto"].mean.value

    grads = jax.jit(jax.grad(total))(params)["logps"]
    assert np.any(grads[batch.rows.branches == 1]) and not np.any(grads[batch.rows.branches != 1])


class Counting:
    """An optimizer that changes nothing and counts the updates it applied, as `make_optimizer`'s does."""

    def update(self, grads, state, params):
        return jax.tree.map(jnp.zeros_like, grads), Applied(state.applied + 1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["applied"], meta_fields=[])
class Applied:
    def __init__(self, applied):
        self.applied = applied


def test_bco_remembers_the_mean_of_all_rewards(params, batch, documents):
    """Step by step: delta is the mean of all rewards up to and with the step's own; the carry counts each once."""
    own = ratios(params, batch, 1)
    rewards = np.array([BETA * own[i] for i in range(9)])
    carry = {"rewards": Mean(jnp.float32(2.0), jnp.float32(4.0)), "reference": jnp.float32(7)}
    state = TrainState(jnp.int32(0), params, Applied(jnp.int32(0)), jax.random.key(0), carry)
    step = make_train_step(objective_of("bco", beta=BETA), Counting(), advance=add_rewards)
    new, metrics = jax.jit(step)(state, None, batch)
    np.testing.assert_allclose(new.carry["rewards"].total, 2.0 + rewards.sum(), rtol=1e-5)
    assert new.carry["rewards"].weight == 13 and new.carry["reference"] == 7
    delta = (2.0 + rewards.sum()) / 13
    np.testing.assert_allclose(metrics["delta"].value, delta, rtol=1e-5)
    sign = [1 if document.completion["label"][0] else -1 for document in documents]
    values = [-math.log(sigmoid(s * (r - delta))) for s, r in zip(sign, rewards, strict=True)]
    np.testing.assert_allclose(metrics["loss"].value, np.mean(values), rtol=1e-5)


def test_carries_are_joined():
    one = Carry({"a": 1}, lambda: {"a": 2}, lambda carry, *_: carry | {"a": carry["a"] + 1})
    two = Carry({"b": 1}, lambda: {"b": 5}, lambda carry, *_: carry | {"b": carry["b"] * 2})
    both = join(one, None, two)
    assert both.abstract == {"a": 1, "b": 1} and both.load() == {"a": 2, "b": 5}
    assert both.advance(both.load(), None, {}, 1) == {"a": 3, "b": 10}
    assert join(None, None) is None


@pytest.mark.parametrize("name, first", [("kto", 0.5), ("apo_zero_unpaired", 0.5), ("bco", math.log(2))])
def test_the_first_loss_is_known(params, batch, name, first):
    """Step-0 identities: of a policy that is its own reference rewards and KL are 0."""
    itself = lambda frozen, carry, batch: frozen["logps"]  # noqa: E731
    objective = unpaired_objective(Given(), name, unpaired.LOSSES[name], chunk=8, reference_logps=itself)
    carry = {"rewards": Mean(jnp.float32(0), jnp.float32(0))}
    terms, metrics = jax.jit(objective)(params, params, carry, batch, None)
    np.testing.assert_allclose(terms[name].mean.value, first, rtol=1e-6)
    assert all(float(metrics[n].value) == 0 for n in metrics if n in ("kl", "delta") or n.startswith("rewards"))


def test_labels_of_one_kind_are_defined(params, documents):
    """Nothing divides by the number of the others."""
    good = [d for d in documents if d.completion["label"][0]]
    batch = build_batch([good], rows_per_step=1, tokens_per_row=64, documents_per_row=3, branches=2)
    given = {name: value[:1] for name, value in params.items()}

    def total(params):
        terms, metrics = objective_of("kto")(params, None, None, batch, None)
        return terms["kto"].mean.value, metrics

    (value, metrics), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(given)
    assert np.isfinite(value) and np.isfinite(grads["logps"]).all()
    assert metrics["rewards/rejected"].value == 0 and metrics["rewards/rejected"].weight == 0


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("given") / "model")


def write_ratings(path, labels):
    records = [
        {"prompt": f"Question {i}?", "completion": f"Answer {i}.", "label": label} for i, label in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def kto_config(model, data, run_dir, **run):
    return dpo_config(model, data, run_dir, **run) | {"stage": "kto"}


def test_kto_reads_pairs_as_good_and_bad_answers(model, tmp_path, caplog):
    caplog.set_level("INFO", "jaxpost")
    run = jaxpost.run(kto_config(model, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run", steps=2))
    assert "labels: 50 good, 50 bad" in caplog.text
    np.testing.assert_allclose(run.metrics["loss"][0, 1], 0.5, atol=1e-5)
    assert run.metrics["kl"][0, 1] < 1e-5 and np.isfinite(run.metrics["eval/loss"]).all()


def test_bco_goes_on_from_a_checkpoint_with_what_it_remembers(model, tmp_path):
    data = write_ratings(tmp_path / "ratings.jsonl", [True, False] * 30)
    config = kto_config(model, data, tmp_path / "run", steps=2) | {"loss": {"name": "bco"}}
    first = jaxpost.run(config)
    seen = float(first.state.carry["rewards"].weight)
    assert seen > 0
    config["run"] |= {"steps": 3, "resume": True}
    again = jaxpost.run(config)
    assert float(again.state.carry["rewards"].weight) > seen


def test_labels_of_one_kind_are_told(model, tmp_path, caplog):
    data = write_ratings(tmp_path / "ratings.jsonl", [True] * 60)
    run = jaxpost.run(kto_config(model, data, tmp_path / "run", steps=2))
    assert "all 50 labels are good, so every answer is only pushed up" in caplog.text
    assert np.isfinite(run.metrics["loss"][:, 1]).all()


def test_a_label_that_is_none_is_told_by_line(model, tmp_path):
    data = write_ratings(tmp_path / "ratings.jsonl", [True, "yes", False])
    config = kto_config(model, data, tmp_path / "run")
    config["data"]["on_bad"] = "error"
    with pytest.raises(DataError, match=r"ratings.jsonl:2: .*label must be true or false, found 'yes'"):
        jaxpost.run(config)


def test_kto_takes_one_loss_of_its_own():
    values = {"stage": "kto", "model": {"path": "m"}, "data": {"train": "d"}, "run": {"steps": 1}}
    with pytest.raises(ValueError, match=r"loss.name: no loss 'sigmoid'; there are kto, apo_zero_unpaired, bco"):
        bind_loss(configs.resolve(values | {"loss": {"name": "sigmoid"}}).loss, unpaired.LOSSES)
    with pytest.raises(ValueError, match=r"loss.name: .*the stage kto takes one loss"):
        configs.resolve(values | {"loss": {"name": ["kto", "bco"]}})
    with pytest.raises(ValueError, match=r"loss.wpo: True, but the stage kto is not of pairs"):
        configs.resolve(values | {"loss": {"wpo": True}})
