"""Mesh, rules and constraints, on 8 simulated devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpost.data.rows import build_batch
from jaxpost.errors import ConfigError
from jaxpost.models.policy import Policy
from jaxpost.models.sharded import row_stats
from jaxpost.plan.chips import open_topology
from jaxpost.sharding import batch_sharding, constrain, make_mesh, named_shardings, shardings_like
from jaxpost.train.objectives import forward
from jaxpost.types import Batch, Document, Origin
from tests.models.tiny import (
    experts_config,
    linear_rows,
    patterned_config,
    random_documents,
    random_params,
    stack_rows,
    tiny_config,
)

ONE = dict.fromkeys(("slices", "data", "fsdp", "expert", "context", "tensor"), 1)
MESHES = {  # data, fsdp, tensor, expert, context, slices
    **{"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 4, 2), "mixed": (2, 2, 2)},
    **{"context": (1, 2, 1, 1, 4), "context_tensor": (1, 2, 2, 1, 2), "slices": (1, 2, 1, 1, 2, 2)},
}
POLICY = Policy(tiny_config(num_layers=2), unroll=False)
ROWS = stack_rows(*(linear_rows(random_documents(7, 6, seed=seed), 16) for seed in range(8)))


def test_the_rest_of_the_devices():
    assert dict(make_mesh().shape) == {**ONE, "fsdp": 8}
    assert dict(make_mesh(data=-1, fsdp=2, tensor=2).shape) == {**ONE, "data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"fsdp": 3}, r"mesh\.fsdp=3.*must be the 8 devices"),
        ({"data": 3}, r"mesh\.data=3.*must divide the 8 devices"),
        ({"fsdp": 4}, r"must be the 8 devices"),
        ({"data": -1}, r"mesh\.data and mesh\.fsdp are both -1"),
        ({"tensor": 0}, r"mesh\.tensor: 0"),
        ({"data": -2}, r"mesh\.data: -2"),
    ],
)
def test_meshes_that_cannot_be(sizes, words):
    with pytest.raises(ConfigError, match=words):
        make_mesh(**sizes)


def test_any_shape_can_be_laid_on_a_torus():
    """An axis of 8 on a torus of 4 x 4: jax by itself refuses it."""
    pytest.importorskip("libtpu")
    devices = open_topology("v5e:4x4")
    mesh = make_mesh(fsdp=2, expert=8, devices=devices)
    assert dict(mesh.shape) == {**ONE, "fsdp": 2, "expert": 8}
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


def test_slices_are_the_outermost_axis():
    pytest.importorskip("libtpu")
    devices = open_topology("v5e:2x2", slices=2)
    mesh = make_mesh(slices=2, fsdp=4, devices=devices)
    found = [{device.slice_index for device in part.flat} for part in mesh.devices]
    assert found == [{0}, {1}]
    with pytest.raises(ConfigError, match=r"mesh\.slices: 1, but the devices lie in 2 slices"):
        make_mesh(devices=devices)


def test_a_plain_gather_works_on_the_mesh():
    """With the Explicit axes that jax.make_mesh gives by default it raises."""
    mesh = make_mesh()
    table = jax.device_put(np.arange(32.0).reshape(16, 2), NamedSharding(mesh, PartitionSpec(None, "tensor")))
    tokens = jax.device_put(np.arange(8).reshape(8, 1), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(lambda t, i: t[i])(table, tokens)[:, 0, 0], np.arange(8) * 2.0)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (("batch",), "name 1 dimensions"),
        (("batch", "lenght"), "unknown logical axis 'lenght'"),
        (("batch", "embed"), "two dimensions on one mesh axis"),
    ],
)
@pytest.mark.parametrize("meshed", [False, True])
def test_constrain_refuses(axes, words, meshed):
    x = jnp.zeros((8, 16))

    def refuse():
        with pytest.raises(ValueError, match=words):
            jax.jit(lambda x: constrain(x, axes))(x)

    if meshed:
        with jax.set_mesh(make_mesh()):
            refuse()
    else:
        refuse()


def test_constrain_places():
    x = jnp.zeros((8, 16, 4))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        y = jax.jit(lambda x: constrain(x, ("batch", "length", "mlp")))(x)
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert constrain(x, ("batch", "length", "mlp")) is x  # no mesh: checked, not placed


def test_a_dimension_that_does_not_divide():
    mesh = make_mesh(fsdp=1, tensor=8)
    config = tiny_config(num_heads=8, num_kv_heads=2, mlp_dim=24, vocab_size=50)
    policy = Policy(config)
    found = named_shardings(policy.axes(), mesh, policy.abstract())
    attn = found["layers"]["attn"]
    whole = ("fsdp", "context")
    assert attn["q"]["weight"].spec == PartitionSpec(None, whole, ("tensor",), None)
    assert attn["k"]["weight"].spec == PartitionSpec(None, whole, None, None)  # copied: fewer heads than devices
    assert found["embed"]["weight"].spec == PartitionSpec(None, whole)
    with pytest.raises(ConfigError, match=r"mesh\.tensor=8.*'mlp' of size 20"):
        odd = Policy(tiny_config(num_heads=8, mlp_dim=20))
        named_shardings(odd.axes(), mesh, odd.abstract())


def grad_fn(params, rows):
    def loss(params):
        stats = row_stats(POLICY.hidden(params, rows)[0], POLICY.head(params), rows, chunk=32, temperature=0.7)
        return -(stats.logps + 0.1 * stats.entropy).sum() / rows.weights.sum(), stats

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def one_device():
    params = random_params(POLICY)
    return params, jax.jit(grad_fn)(params, ROWS)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(name, one_device):
    """Loss, what is said of every token, and gradients, to 1e-5; each in the loss's terms is one the head's part."""
    mesh = make_mesh(*MESHES[name])
    shardings = named_shardings(POLICY.axes(), mesh, POLICY.abstract())
    params, ((expected_loss, expected_stats), expected_grads) = one_device
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings), jax.device_put(ROWS, batch_sharding(mesh))
        (loss, stats), grads = jax.jit(grad_fn, out_shardings=(None, shardings))(*placed)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stats, expected_stats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected_grads)
    local = grads["layers"]["mlp"]["gate"]["weight"].addressable_shards[0].data.shape
    assert local == (2, 16 // (mesh.shape["fsdp"] * mesh.shape["context"]), 24 // mesh.shape["tensor"])


EXPERT_MESHES = {"expert": (1, 1, 1, 8), "expert_data_tensor": (2, 1, 2, 2), "expert_fsdp": (1, 2, 1, 4)}


@pytest.fixture(scope="module")
def experts_on_one_device():
    policy = Policy(experts_config(), unroll=False)
    params = random_params(policy)
    return policy, params, jax.jit(functools.partial(experts_grad_fn, policy))(params, ROWS)


def experts_grad_fn(policy, params, rows):
    """Of the training loss, the experts' own included."""

    def loss(params):
        batch = Batch(rows, {}, {}, np.zeros((8, 2), np.int32))
        stats, terms, metrics = forward(policy, params, batch, chunk=64, key=None)
        return -stats.logps.sum() / rows.weights.sum() + terms["router"].mean.value, metrics

    (loss, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return loss, metrics, grads


@pytest.mark.parametrize("name", EXPERT_MESHES)
def test_experts_over_eight_devices_equal_one(name, experts_on_one_device):
    """Loss, load and gradients, to 1e-5; each device holds its own experts only."""
    policy, params, expected = experts_on_one_device
    mesh = make_mesh(*EXPERT_MESHES[name])
    shardings = named_shardings(policy.axes(), mesh, policy.abstract())
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings), jax.device_put(ROWS, batch_sharding(mesh))
        step = jax.jit(functools.partial(experts_grad_fn, policy), out_shardings=(None, None, shardings))
        found = step(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)
    _, fsdp, tensor, expert = EXPERT_MESHES[name]
    local = found[2]["layers"]["moe"]["gate"]["weight"].addressable_shards[0].data.shape
    assert local == (2, 8 // expert, 16 // fsdp, 12 // tensor)


def test_parameters_are_born_in_their_shards_with_the_same_bits():
    policy = Policy(tiny_config(num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=16, vocab_size=16, tied=True))
    mesh = make_mesh(2, 2, 2)
    shardings = named_shardings(policy.axes(), mesh, policy.abstract())
    with jax.set_mesh(mesh):
        split = jax.jit(policy.init, out_shardings=shardings)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, split, jax.jit(policy.init)(jax.random.key(0)))
    assert split["embed"]["weight"].addressable_shards[0].data.shape == (8, 8)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adam(1e-3), {"a": {"w": True, "b": False}})),
        optax.multi_transform({"x": optax.lion(1e-3), "y": optax.adam(1e-3)}, {"a": {"w": "x", "b": "y"}}),
    ],
    ids=["adamw", "masked", "multi_transform"],
)
def test_moments_lie_where_their_parameters_lie(optimizer):
    mesh = make_mesh()
    split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("fsdp", None))
    params = {"a": {"w": jnp.ones((8, 3)), "b": jnp.ones(3)}}
    where = {"a": {"w": split, "b": whole}}
    params = jax.device_put(params, where)
    state = jax.eval_shape(optimizer.init, params)
    shardings = shardings_like(where, state, mesh, params)
    with jax.set_mesh(mesh):
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (8, 3)]
    assert moments
    assert all(leaf.addressable_shards[0].data.shape == (1, 3) for leaf in moments)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state) if leaf.shape != (8, 3))


def test_factored_moments_are_copied():
    mesh = make_mesh()
    params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    state = jax.eval_shape(optax.adafactor(1e-3).init, params)
    found = shardings_like({"w": NamedSharding(mesh, PartitionSpec("fsdp"))}, state, mesh, params)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(found))


CONTEXT = {
    "plain": ("xla", (1, 2, 1, 1, 4)),
    "kernel": ("interpret", (1, 2, 1, 1, 4)),
    "heads": ("xla", (1, 1, 2, 1, 4)),
}


@pytest.fixture(scope="module")
def branching():
    """Pairs that share prompts, two a row, on layers with windows; gradients on one device."""
    policy = Policy(dataclasses.replace(patterned_config(), num_layers=2), unroll=False)
    rows = build_batch(
        [[pair(6, 5, 4, seed=2 * n), pair(5, 3, 2, seed=2 * n + 1)] for n in range(8)],
        **{"rows_per_step": 8, "tokens_per_row": 32, "documents_per_row": 2, "branches": 2},
    ).rows
    params = random_params(policy)
    return policy, rows, params, jax.jit(functools.partial(of_every_token, policy))(params, rows)


def pair(prompt, *completions, seed):
    first, *rest = random_documents(prompt, *completions, seed=seed)
    weights = tuple(np.ones(len(completion), np.float32) for completion in rest)
    return Document(first, tuple(rest), weights, 0, Origin("here", 1))


def of_every_token(policy, params, rows):
    def loss(params):
        stats = row_stats(policy.hidden(params, rows)[0], policy.head(params), rows, chunk=64)
        return stats.logps.sum(), stats.logps

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("name", CONTEXT)
def test_rows_split_along_their_tokens_equal_whole_ones(name, branching):
    """Log-probabilities and gradients to 1e-5 of the largest, branches, segments and windows respected."""
    kernels, sizes = CONTEXT[name]
    policy, rows, params, ((_, logps), gradients) = branching
    policy, mesh = dataclasses.replace(policy, kernels=kernels), make_mesh(*sizes)
    shardings = named_shardings(policy.axes(), mesh, policy.abstract())
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings), jax.device_put(rows, batch_sharding(mesh))
        step = jax.jit(functools.partial(of_every_token, policy), out_shardings=(None, shardings))
        (_, found), grads = step(*placed)
    np.testing.assert_allclose(found, logps, atol=1e-5 * np.abs(logps).max())
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
