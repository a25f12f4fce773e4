"""Costs of programs compiled for 8 CPU devices, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.plan.hlo import Traffic, analyse
from jaxpost.plan.program import elements, parts, read, trips

D, F, L = 64, 128, 5


def costs_of(function, *shapes, mesh_shape=None, specs=None, **options):
    """Of `function` jit-compiled for abstract f32 arguments, on a mesh with their specs."""
    mesh_shape = mesh_shape or {"x": 1}
    devices = np.array(jax.devices()[: int(np.prod(list(mesh_shape.values())))]).reshape(list(mesh_shape.values()))
    mesh = jax.sharding.Mesh(devices, tuple(mesh_shape), axis_types=(AxisType.Auto,) * len(mesh_shape))
    specs = specs or [P()] * len(shapes)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    out = options.pop("out", None)
    how = {} if out is None else {"out_shardings": NamedSharding(mesh, out)}
    return analyse(jax.jit(function, **how).lower(*arguments).compile().as_text(), mesh_shape, **options)


def test_a_product():
    costs = costs_of(lambda x, w: x @ w, (32, D), (D, F))
    assert costs.flops == 2 * 32 * D * F
    assert costs.hbm_bytes == 4 * (32 * D + D * F + 32 * F)
    assert costs.collectives == {}


def test_a_batched_product_contracts_several_dimensions():
    costs = costs_of(lambda q, k: jnp.einsum("bthd,bshd->bts", q, k), (2, 16, 4, 8), (2, 24, 4, 8))
    assert costs.flops == 2 * 2 * 16 * 24 * (4 * 8)


def test_a_convolution_counts_no_padding():
    """Of 10 x 10 places under a window of 3 x 3, 28 x 28 of 30 x 30 pairs of place and offset lie in the picture."""

    def same(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert costs_of(same, (2, 10, 10, 4), (3, 3, 4, 8)).flops == 2 * 2 * 4 * 8 * 28 * 28


@pytest.mark.parametrize("groups, features", [(1, 6), (3, 2)])
def test_a_strided_grouped_convolution(groups, features):
    def one(x, w):
        kind = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, w, (2,), "VALID", dimension_numbers=kind, feature_group_count=groups)

    out = (11 - 3) // 2 + 1
    assert costs_of(one, (4, 11, 6), (3, features, 9)).flops == 2 * 4 * out * 9 * 3 * features


def scanned(x, ws):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0]


def unrolled(x, ws):
    for w in ws:
        x = jnp.tanh(x @ w)
    return x


def test_scanned_layers_cost_what_unrolled_ones_do():
    shapes = (32, D), (L, D, D)
    scan, straight = costs_of(scanned, *shapes), costs_of(unrolled, *shapes)
    assert scan.flops == straight.flops == L * 2 * 32 * D * D
    assert scan.loops == ()


def test_a_scan_reads_one_layer_at_a_time():
    """The stack is read once in all, not whole in every round."""
    stack = 4 * L * 256 * 256
    few = costs_of(scanned, (8, 256), (L, 256, 256)).hbm_bytes
    assert stack <= few < 4 * stack


def test_a_gradient_costs_three_times_the_forward_pass():
    """Less the product for the gradient of the input, which nobody asks for."""
    both = costs_of(jax.grad(lambda ws, x: scanned(x, ws).sum()), (L, D, D), (32, D))
    assert both.flops in (3 * L * 2 * 32 * D * D, (3 * L - 1) * 2 * 32 * D * D)


def test_nested_loops_multiply():
    def nested(x, ws):
        def outer(h, w):
            return jax.lax.fori_loop(0, 7, lambda _, h: jnp.tanh(h @ w), h), None

        return jax.lax.scan(outer, x, ws)[0]

    assert costs_of(nested, (32, D), (L, D, D)).flops == 7 * L * 2 * 32 * D * D


def test_a_loop_whose_end_depends_on_data_is_listed():
    def until(x, w):
        return jax.lax.while_loop(lambda h: h.sum() < 9.0, lambda h: h @ w, x)

    one = costs_of(until, (32, D), (D, D))
    assert [(loop.trips, loop.how) for loop in one.loops] == [(1, "assumed")]
    asked = costs_of(until, (32, D), (D, D), unknown_trips=lambda name: 11 if "while" in name else 0)
    assert asked.flops == 11 * one.flops == 11 * 2 * 32 * D * D


def test_a_loop_that_may_end_early_counts_its_bound():
    def until(x, w):
        def running(state):
            return (state[0] < 6) & (state[1].sum() < 9.0)

        return jax.lax.while_loop(running, lambda state: (state[0] + 2, state[1] @ w), (0, x))[1]

    costs = costs_of(until, (32, D), (D, D))
    assert costs.flops == 3 * 2 * 32 * D * D
    assert [(loop.trips, loop.how) for loop in costs.loops] == [(3, "at most")]


def test_the_dearest_branch_counts():
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert costs_of(either, (32, D), (D, D)).flops == 2 * 2 * 32 * D * D


MESH = {"data": 2, "fsdp": 4}


def test_a_gathered_weight():
    """Rows over all devices, the weight over fsdp: every device gathers it and computes its own rows."""
    costs = costs_of(
        lambda x, w: x @ w,
        (64, D),
        (D, F),
        mesh_shape=MESH,
        specs=[P(("data", "fsdp")), P("fsdp")],
        out=P(("data", "fsdp")),
    )
    whole = 4 * D * F
    assert costs.flops == 2 * 8 * D * F
    assert costs.collectives == {("all-gather", ("fsdp",)): Traffic(bytes=whole * 3 // 4, count=1, output=whole)}
    assert costs.gathered == {("fsdp",): whole}


def test_a_contraction_over_devices_is_reduced():
    costs = costs_of(
        lambda x, w: x @ w, (64, D), (D, F), mesh_shape=MESH, specs=[P("data", "fsdp"), P("fsdp")], out=P("data")
    )
    part = 4 * 32 * F
    assert costs.flops == 2 * 32 * (D // 4) * F
    assert costs.collectives == {("all-reduce", ("fsdp",)): Traffic(bytes=2 * part * 3 // 4, count=1, output=part)}


def test_collectives_written_out():
    """all-to-all, reduce-scatter and a permute, under shard_map; the third round of a ring is one more permute."""

    def written(x):
        x = jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)
        x = jax.lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True)
        return jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])

    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(written, mesh=mesh, in_specs=P(), out_specs=P(("data", "fsdp")), check_vma=False)
    costs = costs_of(mapped, (16, 8), mesh_shape=MESH)
    size = 4 * 16 * 8
    assert costs.collectives == {
        ("all-to-all", ("fsdp",)): Traffic(size * 3 // 4, 1, size),
        ("reduce-scatter", ("data",)): Traffic(size // 2, 1, size // 2),
        ("collective-permute", ("fsdp",)): Traffic(size // 2, 1, size // 2),
    }
    assert costs.scattered == {("data",): size}


def test_a_scanned_fsdp_layer_gathers_its_weights_twice():
    """Forward and backward pass; the gradient is reduced over all devices that hold other rows."""

    def loss(ws, x):
        return scanned(x, ws).sum()

    specs = [P(None, "fsdp"), P(("data", "fsdp"))]
    costs = costs_of(jax.grad(loss), (L, D, D), (64, D), mesh_shape=MESH, specs=specs, out=P(None, "fsdp"))
    assert costs.gathered[("fsdp",)] == 2 * 4 * L * D * D
    reduced = [axes for kind, axes in costs.collectives if kind in ("all-reduce", "reduce-scatter")]
    assert {name for axes in reduced for name in axes} == {"data", "fsdp"}


LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=1

%body (p: (s32[], f32[4], s32[], s32[])) -> (s32[], f32[4], s32[], s32[]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} get-tuple-element(%p), index=3
  %i2 = s32[]{:T(128)} add(%i, %one)
  %i3 = s32[]{:T(128)} add(%i2, %one)
  %x = f32[4]{0:T(128)S(1)} get-tuple-element(%p), index=1
  ROOT %t = (s32[]{:T(128)}, f32[4]{0:T(128)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}) tuple(%i3, %x, %n, %one)
}

%compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=DIRECTION
}

%end (p.1: (s32[], f32[4], s32[], s32[])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[4]{0:T(128)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=2
  ROOT %c = pred[]{:T(512)} fusion(%i.1, %n.1), kind=kLoop, calls=%compare
}

ENTRY %main (x.1: f32[4]) -> f32[4] {
  %x.1 = f32[4]{0:T(128)} parameter(0)
  %zero = s32[] constant(START)
  %limit = s32[] constant(9)
  %step = s32[] constant(1)
  %start = (s32[], f32[4]{0:T(128)}, s32[], s32[]) tuple(%zero, %x.1, %limit, %step)
  %w = (s32[]{:T(128)}, f32[4]{0:T(128)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}) while(%start), condition=%end, body=%body
  ROOT %r = f32[4]{0:T(128)S(1)} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(
    "direction, start, count",
    [("LT", 0, 5), ("LE", 0, 5), ("LE", 1, 5), ("LT", 1, 4), ("NE", 1, 4), ("NE", 0, None), ("GT", 0, None)],
)
def test_trips_of_a_loop_in_a_tpus_words(direction, start, count):
    """By twice one up to 9, both carried unchanged, compared in a fusion; a loop in Python says how often."""
    program = read(LOOP.replace("DIRECTION", direction).replace("START", str(start)))
    entry = program.computations[program.entry]
    assert trips(program, entry, entry.operations["w"], {}).count == count
    holds = {"LT": lambda i: i < 9, "LE": lambda i: i <= 9, "NE": lambda i: i != 9}.get(direction)
    if count is not None:
        rounds, i = 0, start
        while holds(i):
            rounds, i = rounds + 1, i + 2
        assert rounds == count


def test_shapes():
    one, two = parts("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f8e4m3fn[7]{0:S(5)}, token[])")
    assert (one.bytes, one.space, two.bytes, two.space) == (12, 1, 7, 5)
    assert sum(part.bytes for part in parts("(pred[3], s4[5]{0}, c64[])")) == 3 + 3 + 8
    assert elements("((f32[2]{0}, s8[1]), f32[4]{0:T(8,128)})") == ["(f32[2]{0}, s8[1])", "f32[4]{0:T(8,128)}"]


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        analyse("HloModule nothing\n", {"x": 1})
