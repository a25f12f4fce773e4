"""Moments, weights that stay and residuals in the host's memory: the same numbers, and it is really there."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import jaxpost
from jaxpost import config as configs
from jaxpost.errors import ConfigError
from jaxpost.models import lora
from jaxpost.models.policy import Policy
from jaxpost.plan import ledger
from jaxpost.plan.chips import open_topology
from jaxpost.plan.hlo import analyse
from jaxpost.sharding import batch_sharding, make_mesh, named_shardings, on_host, with_dtype
from jaxpost.train.setup import with_shardings
from jaxpost.types import Rows
from tests.models.tiny import patterned_config, tiny_config
from tests.worlds import dpo_config, write_model, write_pairs

CLOSE = {"atol": 1e-6, "rtol": 0}
OFFLOADED = {"offload": {"moments": True, "reference": True}, "remat": {"policy": "offload"}}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return write_model(folder / "model"), write_pairs(folder / "pairs.jsonl", 30)


def dpo(given, folder, *, run=None, **changes):
    config = dpo_config(*given, folder, **{"steps": 2, **(run or {})})
    config["data"]["eval_examples"] = 4
    return jaxpost.run(config | {"reference": {"mode": "live"}} | changes)


@pytest.fixture(scope="module")
def offloaded(given, tmp_path_factory):
    return dpo(given, tmp_path_factory.mktemp("offloaded") / "run", run={"checkpoint_every": 1}, **OFFLOADED)


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def same(ours, theirs, **limits):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), **limits)


def test_what_waits_on_the_host_changes_no_number(given, offloaded, tmp_path):
    plain = dpo(given, tmp_path / "run", remat={"policy": "full"})
    for ours, theirs in zip(offloaded.rows, plain.rows, strict=True):
        for name in ("loss", "grad_norm", "eval/loss"):
            np.testing.assert_allclose(ours.get(name, 0), theirs.get(name, 0), **CLOSE)
    same(offloaded.params, plain.params, **CLOSE)
    moments = [run.state.opt_state.inner for run in (offloaded, plain)]
    assert [kinds(tree) for tree in moments] == [{"pinned_host"}, {"device"}]
    same(*moments, **CLOSE)


def test_a_run_with_moments_on_the_host_resumes(given, offloaded, tmp_path):
    """From step 1 of 2, to the bit."""
    shutil.copytree(offloaded.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    resumed = dpo(given, tmp_path / "run", run={"checkpoint_every": 1, "resume": True}, **OFFLOADED)
    assert kinds(resumed.state.opt_state.inner) == {"pinned_host"}
    same((resumed.params, resumed.state.opt_state), (offloaded.params, offloaded.state.opt_state), atol=0, rtol=0)


@pytest.mark.slow
def test_a_quantised_base_beneath_adapters_waits_on_the_host(given, tmp_path):
    """It is policy and reference in one, read by the backward pass too; completions and export work it in."""
    changes = {"lora": {"rank": 2, "quantize": "int8"}, "remat": {"policy": "full"}}
    run = {"eval_prompts": 1, "eval_new_tokens": 2, "export": True}
    runs = [
        dpo(given, tmp_path / name, run=run, **changes, **more)
        for name, more in (("plain", {}), ("offloaded", {"offload": {"reference": True}}))
    ]
    base = [lora.split(run.params)[0] for run in runs]
    assert [kinds(tree) for tree in base] == [{"device"}, {"pinned_host"}]
    same(base[1], base[0], atol=0, rtol=0)
    same(runs[1].state.params, runs[0].state.params, **CLOSE)


@pytest.mark.parametrize("make", [tiny_config, pytest.param(patterned_config, marks=pytest.mark.slow)])
def test_a_layer_at_a_time_comes_to_a_tpu_in_its_shards(make):
    """Of weights on the host every byte is read once a pass, and no device ever holds them all."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    sizes = {"embed_dim": 256, "mlp_dim": 1024, "num_heads": 4, "head_dim": 128, "vocab_size": 128, "tied": True}
    config = dataclasses.replace(make(), num_layers=8, **sizes)
    policy = Policy(config, "bfloat16", platform="tpu", kernels="xla")
    mesh = make_mesh(data=1, fsdp=4, devices=open_topology("v5e:2x2"))
    abstract = with_dtype(policy.abstract(), "bfloat16")
    params = with_shardings(abstract, on_host(named_shardings(policy.axes(), mesh, abstract)))
    ints = jax.ShapeDtypeStruct((4, 128), np.int32, sharding=batch_sharding(mesh))
    rows = Rows(ints, ints, ints, ints, jax.ShapeDtypeStruct(ints.shape, np.float32, sharding=ints.sharding))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda params, rows: policy.hidden(params, rows)[0]).lower(params, rows).compile()
    memory, held = compiled.memory_analysis(), ledger.held(params, host=True)
    assert analyse(compiled.as_text(), dict(mesh.shape)).host_bytes == memory.host_argument_size_in_bytes == held
    # A period of layers and the next one, whole: each of the four devices holds a quarter of all eight.
    most = (len(config.pattern) + 1) * 4 * held // 8
    assert memory.argument_size_in_bytes < held / 10 and memory.temp_size_in_bytes < most


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"reference": {"mode": "cached"}}, r"offload\.reference: True, but the step reads no weights but those"),
        ({"reference": {"mode": "moving"}}, r"offload\.reference: True, but the step reads no weights but those"),
        ({"lora": {"rank": 2}}, r"remat\.policy: 'none' keeps what it reads of the base"),
        ({"model": {"path": "x", "adapter": "a:b"}}, r"offload\.reference: somebody else's model"),
    ],
)
def test_nothing_is_offloaded_in_vain(changes, line):
    config = {"reference": {"mode": "live"}, "offload": {"reference": True}} | changes
    with pytest.raises(ConfigError, match=line):
        configs.resolve(dpo_config("x", "x", "x") | config)
