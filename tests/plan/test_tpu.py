"""Costs of programs that the TPU compiler made here, without a TPU, counted by hand."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.errors import ConfigError
from jaxpost.plan import chips
from jaxpost.plan.chips import CHIPS, describe, open_topology, slices_of
from jaxpost.plan.hlo import Kernel, analyse

pytest.importorskip("libtpu", reason="the TPU compiler is not installed")

L, D, F, B, T = 3, 256, 512, 16, 128
PRODUCT = 2 * B * T * D * F


def mesh_over(devices, **shape):
    devices = np.array(devices).reshape(list(shape.values()))
    return jax.sharding.Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def mlp_loss(weights, x):
    def layer(hidden, pair):
        inner = jax.nn.silu(jnp.einsum("btd,df->btf", hidden, pair[0]))
        return jnp.einsum("btf,df->btd", inner, pair[1]), None

    hidden, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
    return jnp.mean(jnp.square(hidden.astype(jnp.float32)))


def mlp_costs(devices, **shape):
    """Of one descent step of L layers of two products, weights over fsdp and tensor, rows over data and fsdp."""
    mesh = mesh_over(devices, **shape)
    axis = {name: name if name in shape else None for name in ("fsdp", "tensor")}
    where = NamedSharding(mesh, P(None, axis["fsdp"], axis["tensor"]))
    rows = NamedSharding(mesh, P(tuple(name for name in ("data", "fsdp") if name in shape)))
    weights = (jax.ShapeDtypeStruct((L, D, F), jnp.bfloat16, sharding=where),) * 2
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16, sharding=rows)

    def step(weights, x):
        return jax.tree.map(lambda w, g: w - g, weights, jax.grad(mlp_loss)(weights, x))

    text = jax.jit(step, out_shardings=(where, where), donate_argnums=0).lower(weights, x).compile().as_text()
    return analyse(text, dict(mesh.shape))


PARAMETERS = 2 * 2 * L * D * F  # bytes


@pytest.mark.parametrize(
    "topology, shape", [("v5e:2x2", {"data": 1, "fsdp": 4}), ("v5p:2x2x1", {"fsdp": 2, "tensor": 2})]
)
def test_a_scanned_fsdp_layer(topology, shape):
    """Two products forward, the first again for the backward pass, four backward: 7. Weights are gathered twice.

    Whether the compiler gathers them at once or in a ring within the product is its own choice; in a ring of four the
    sums of a gradient start one round early, with zeros.
    """
    costs = mlp_costs(open_topology(topology), **shape)
    assert costs.flops == 7 * L * PRODUCT // 4
    assert costs.gathered == {("fsdp",): 2 * PARAMETERS // shape.get("tensor", 1)}
    assert costs.loops == ()
    gradient = PARAMETERS // shape.get("tensor", 1)
    assert gradient <= costs.scattered[("fsdp",)] <= gradient * 4 // 3
    assert all("?" not in axes for _, axes in costs.collectives)


def test_two_slices_send_their_gradients():
    """Each device its part of the gradient: an all-reduce over two slices receives as much as it holds."""
    costs = mlp_costs(open_topology("v5e:2x2", slices=2), data=2, fsdp=4)
    assert costs.slice_axes == ("data",)
    assert costs.flops == 7 * L * PRODUCT // 8
    assert costs.between_slices["all-reduce"].bytes == PARAMETERS // 4
    assert costs.gathered == {("fsdp",): 2 * PARAMETERS}


def test_a_product_larger_than_vmem_moves_through_hbm():
    """Two operands are read and the product is written, 128 MiB each."""
    where = NamedSharding(mesh_over(open_topology("v5e:1x1"), x=1), P())
    x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=where)
    costs = analyse(jax.jit(lambda x, w: x @ w).lower(x, x).compile().as_text(), {"x": 1})
    assert (costs.hbm_bytes, costs.flops) == (3 * 2 * 8192**2, 2 * 8192**3)


def test_residuals_on_the_host_go_there_and_back():
    """A layer's input, [1024, 256] f32 in each of 4 layers, to the host in the forward pass, back in the backward."""
    layers, rows, width = 4, 1024, 256
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["in"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def loss(ws, x):
        def layer(h, w):
            return jnp.tanh(checkpoint_name(h, "in") @ w), None

        return jax.lax.scan(jax.checkpoint(layer, policy=policy), x, ws)[0].sum()

    where = NamedSharding(mesh_over(open_topology("v5e:1x1"), x=1), P())
    ws = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=where)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=where)
    costs = analyse(jax.jit(jax.grad(loss)).lower(ws, x).compile().as_text(), {"x": 1})
    assert costs.host_bytes == 2 * layers * 4 * rows * width


@pytest.mark.parametrize("estimate", [None, pl.CostEstimate(flops=1234, transcendentals=0, bytes_accessed=99)])
def test_a_kernel_costs_what_it_says(estimate):
    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    def run(x):
        call = pl.pallas_call(double, out_shape=x, cost_estimate=estimate, name="doubled")
        return jax.lax.fori_loop(0, 3, lambda _, x: call(x), x)

    where = NamedSharding(mesh_over(open_topology("v5e:1x1"), x=1), P())
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=where)
    costs = analyse(jax.jit(run).lower(x).compile().as_text(), {"x": 1})
    flops = 3 * 1234 if estimate else 0
    assert costs.kernels == {"doubled": Kernel(3, flops, estimate is not None)}
    assert costs.flops == flops


@pytest.mark.parametrize(
    "name", [f"{chip}:{layout}" for chip in ("v4", "v5e", "v5p", "v6e") for layout in slices_of(chip)[:8]]
)
def test_topologies_that_are_named_exist(name):
    devices = open_topology(name)
    assert len(devices) == describe(name)[1]
    assert len({tuple(device.coords) for device in devices}) == len(devices)  # a device is a whole chip


@pytest.mark.parametrize("name, slack", [("v5e:2x2", 1.02), ("v4:2x2x1", 1.02), ("v5p:2x2x1", 1.02), ("v6e:2x2", 1.02)])
def test_usable_memory_is_what_the_compiler_grants(name, slack):
    """A program just within fits, one just beyond is refused."""
    usable = CHIPS[name.partition(":")[0]].usable_bytes
    where = NamedSharding(mesh_over(open_topology(name)[:1], x=1), P())
    compiled = lambda size: (  # noqa: E731
        jax.jit(lambda x: x + 1, donate_argnums=0)
        .lower(jax.ShapeDtypeStruct((int(size) >> 21, 1024, 1024), jnp.bfloat16, sharding=where))
        .compile()
    )
    compiled(usable / slack)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compiled(usable * slack)


def test_loading_says_nothing_and_leaves_the_environment():
    code = (
        "import os, jax; jax.devices(); before = dict(os.environ)\n"
        "from jaxpost.plan.chips import open_topology\n"
        "print(len(open_topology('v5e:4x4')), dict(os.environ) == before)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "ALLOW_MULTIPLE_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["16", "True"], "")


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"v5e:2x2.*pip install 'jaxpost\[tpu\]'"):
        open_topology("v5e:2x2")
