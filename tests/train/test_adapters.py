"""Runs that train adapters: step 0, what is held, what is written, and what is refused."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpost
from jaxpost import config as configs
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models import hf, lora
from jaxpost.models.policy import Policy
from jaxpost.train.setup import open_mesh, open_model, open_reference
from tests.train.test_runs import same_bits, same_rows
from tests.worlds import dpo_config, write_model, write_pairs

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return write_model(folder / "model"), write_pairs(folder / "pairs.jsonl")


def config_of(given, run_dir, settings=LORA, **run):
    return dpo_config(*given, run_dir, **run) | {"lora": settings}


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A run of adapters on 8 devices."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return jaxpost.run(config_of(given, run_dir, export=True, eval_every=3, checkpoint_every=3))


def plain_params(given):
    policy = Policy(hf.read_config(str(given[0])))
    return policy, hf.load_params(str(given[0]), policy)


def metric(run, name):
    return run.metrics[name][:, 1]


def test_only_adapters_train(given, whole):
    """ln 2 and equal log-probabilities at first; then the loss falls, the base stays to the bit, it has no moments."""
    np.testing.assert_allclose(metric(whole, "loss")[0], np.log(2), atol=1e-5)
    np.testing.assert_allclose(metric(whole, "rewards/margins")[0], 0, atol=1e-4)
    assert metric(whole, "loss")[-1] < 0.68
    base, adapters = lora.split(whole.params)
    same_bits(base, plain_params(given)[1])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(adapters))
    trained = {leaf.shape for leaf in jax.tree.leaves(whole.state.params)}
    held = [leaf.shape for leaf in jax.tree.leaves(whole.state.opt_state) if leaf.ndim]
    assert set(held) == trained and len(held) == 2 * len(jax.tree.leaves(adapters))


def test_a_stopped_run_of_adapters_goes_on(given, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    resumed = jaxpost.run(
        config_of(given, tmp_path / "run", eval_every=3, checkpoint_every=3, export=True, resume=True)
    )
    same_rows(resumed.rows, whole.rows)
    same_bits(resumed.params, whole.params)


def test_exports(given, whole, tmp_path):
    """PEFT's folder holds the adapters; loaded over the base, or merged into it, they are the run's model."""
    own = jaxpost.load(whole.folder)
    same_bits(own.params, whole.params)
    words = own.answer([[{"role": "user", "content": "What is the capital of France?"}]], 8)
    base = jaxpost.load(given[0])
    beside = base.with_adapter(whole.folder / "export")
    same_bits(beside.params, whole.params)
    ids = {name: id(leaf) for name, leaf in base.params["embed"].items()}
    assert ids == {name: id(leaf) for name, leaf in beside.params["embed"].items()}  # shared
    own.export(tmp_path / "merged", merge=True)
    merged = jaxpost.load(tmp_path / "merged")
    assert merged.model.policy.lora is None
    for name, leaf in lora.merged(whole.params, own.model.policy.lora)["layers"]["attn"].items():
        np.testing.assert_array_equal(merged.params["layers"]["attn"][name]["weight"], leaf["weight"])
    conversation = [[{"role": "user", "content": "What is the capital of France?"}]]
    assert merged.answer(conversation, 8) == beside.answer(conversation, 8) == words


@pytest.mark.parametrize("mode", ["cached", pytest.param("live", marks=pytest.mark.slow)])
def test_a_loaded_adapter_is_its_own_reference(given, whole, tmp_path, mode):
    """Unless the config names another."""
    settings = {"path": str(whole.folder / "export")}
    first = lambda reference, name: metric(  # noqa: E731
        jaxpost.run(config_of(given, tmp_path / name, settings, steps=2) | {"reference": {"mode": mode, **reference}}),
        "loss",
    )[0]
    np.testing.assert_allclose(first({}, "own"), np.log(2), atol=1e-5)
    from_base = first({"path": str(given[0])}, "base")
    assert from_base < np.log(2) - 0.01  # the adapter has learnt these pairs
    # Weights that all train, against the adapter on the same base: the other way round.
    config = dpo_config(*given, tmp_path / "plain", steps=2)
    plain = jaxpost.run(config | {"reference": {"mode": mode, "path": str(whole.folder / "export")}})
    assert metric(plain, "loss")[0] > np.log(2) + 0.01


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_base_and_reference_are_one(given, kind):
    """No second set of weights; quantised ones are split over the devices as the plain ones are."""
    config = configs.resolve(config_of(given, "unused", LORA | {"quantize": kind}))
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    reference = open_reference(config, model, mesh).load()
    held = jax.tree.leaves(model.load_frozen()["base"])
    assert all(ours is theirs for ours, theirs in zip(held, jax.tree.leaves(reference), strict=True))
    leaves = model.load_frozen()["base"]["layers"]["attn"]["q"]
    values = leaves["weight" if kind == "none" else f"weight_{kind}"]
    assert values.dtype == {"none": jnp.float32, "int8": jnp.int8, "nf4": jnp.uint8}[kind]
    assert values.addressable_shards[0].data.size * len(jax.devices()) == values.size


@pytest.mark.slow
def test_a_reference_that_follows_adapters(given, tmp_path):
    config = config_of(given, tmp_path / "run", steps=3)
    run = jaxpost.run(config | {"reference": {"mode": "moving", "alpha": 1.0, "every": 2}})
    np.testing.assert_allclose(metric(run, "loss")[[0, 2]], np.log(2), atol=1e-5)  # copied after the second update
    assert metric(run, "loss")[1] < np.log(2) - 1e-4
    assert jax.tree.structure(run.state.carry["reference"]) == jax.tree.structure(run.state.params)


def test_a_quantised_base_starts_at_ln_2_and_learns(given, tmp_path):
    run = jaxpost.run(config_of(given, tmp_path / "run", LORA | {"quantize": "nf4", "dora": True}, export=True))
    np.testing.assert_allclose(metric(run, "loss")[0], np.log(2), atol=1e-5)
    assert metric(run, "loss")[-1] < 0.68
    run.export(tmp_path / "merged", merge=True)
    conversation = [[{"role": "user", "content": "What is the capital of France?"}]]
    assert jaxpost.load(tmp_path / "merged").answer(conversation, 8) == run.answer(conversation, 8)


FAULTS = {
    "nothing matches": (LORA | {"targets": ("q_proj",)}, r"lora\.targets: 'q_proj' matches none of attn/q"),
    "a quantised base that trains": ({"quantize": "nf4"}, r"lora\.quantize: 'nf4', but quantised weights do not train"),
    "no rank": ({"alpha": 3.0}, r"lora\.alpha: 3\.0, but there are no adapters"),
    "two ranks": ({"path": "somewhere", "rank": 3}, r"lora\.rank: 3, but the adapter of lora\.path has its own"),
    "no adapter there": ({"path": "MODEL"}, r"lora\.path: .* holds no adapter_config\.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_settings(given, fault):
    settings, reason = FAULTS[fault]
    settings = {name: str(given[0]) if value == "MODEL" else value for name, value in settings.items()}
    with pytest.raises(ConfigError, match=reason):
        jaxpost.run(config_of(given, "unused", settings))


def test_an_adapter_of_another_base_is_refused(whole, given, tmp_path):
    other = write_model(tmp_path / "other", embed_dim=64)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: tensor .* has shape"):
        jaxpost.load(other).with_adapter(whole.folder / "export", any_base=True)
    twin = shutil.copytree(given[0], tmp_path / "twin")
    tensors = load_file(twin / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors: was trained on other weights than those in"
    ):
        jaxpost.load(twin).with_adapter(whole.folder / "export")
    assert jaxpost.load(twin).with_adapter(whole.folder / "export", any_base=True).model.policy.lora.rank == 4
    with pytest.raises(ConfigError, match="merge: the model has no adapters"):
        jaxpost.load(given[0]).export(tmp_path / "merged", merge=True)


def test_a_reward_model_of_adapters(given, tmp_path):
    """Its scalar heads train beside the adapters; the run, and its merged export, score alike."""
    config = config_of(given, tmp_path / "run", steps=4) | {"stage": "reward"}
    run = jaxpost.run(config)
    np.testing.assert_allclose(metric(run, "loss")[0], np.log(2), atol=1e-6)
    assert np.abs(run.params["score"]["weight"]).max() > 0
    words = "What is the capital of France?", ["Paris.", "It is a long way to Rome."]
    expected = run.score(*words).mean
    assert np.ptp(expected) > 0
    run.export(tmp_path / "merged", merge=True)
    for path in (tmp_path / "run", tmp_path / "merged"):
        np.testing.assert_allclose(jaxpost.load(path).score(*words).mean, expected, atol=1e-4)
