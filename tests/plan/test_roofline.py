"""Chips and rooflines by hand arithmetic."""

import pytest

from jaxpost.errors import ConfigError
from jaxpost.plan.chips import CHIPS, describe, open_topology
from jaxpost.plan.hlo import Costs, Traffic
from jaxpost.plan.roofline import Roofline, rates, roofline


def costs_of(flops=0, hbm=0, collectives=None, between=None):
    return Costs(flops, hbm, 0, collectives or {}, {}, (), {}, {}, between or {}, ())


@pytest.mark.parametrize(
    "name, chip, devices", [("v5e:4x4", "v5e", 16), ("v5p:4x4x8", "v5p", 128), ("h100:16", "h100", 16)]
)
def test_topologies(name, chip, devices):
    assert describe(name) == (CHIPS[chip], devices)


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5e:3x3", "v5e comes as 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5p:8x4x4", "rising order"),
        ("v5e", "v5e comes as"),
        ("v9:2x2", "there are v4, v5e, v5p, v6e"),
        ("h100:9", "multiple of 8"),
        ("h100:", "multiple of 8"),
    ],
)
def test_a_topology_that_does_not_exist_lists_those_that_do(name, said):
    with pytest.raises(ConfigError, match=f"topology {name}: .*{said}"):
        describe(name)


def test_gpus_have_no_compiler_here():
    with pytest.raises(ConfigError, match="TPUs only"):
        open_topology("h100:8")


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_figure_has_a_source(chip):
    figures = {"flops", "memory_bytes", "usable_bytes", "memory_bandwidth", "link_bandwidth"}
    assert set(chip.sources) == figures | ({"network_bandwidth"} if chip.network_bandwidth else set())
    assert all(chip.sources.values())
    assert 0.7 * chip.memory_bytes < chip.usable_bytes < 1.01 * chip.memory_bytes


def test_compute_and_memory():
    line = roofline(costs_of(flops=197e12, hbm=819e9 * 2), CHIPS["v5e"], {"fsdp": 16}, (4, 4))
    assert (line.compute, line.memory, line.interconnect, line.network) == (1.0, 2.0, {}, 0.0)
    assert (line.bound, line.seconds, line.serial_seconds) == ("memory", 2.0, 3.0)


@pytest.mark.parametrize(
    "chip, mesh, dims, axes, links",
    [
        ("v5e", {"fsdp": 16}, (4, 4), ("fsdp",), 2),  # both sides, neither closed
        ("v5e", {"data": 4, "fsdp": 4}, (4, 4), ("fsdp",), 1),
        ("v5e", {"data": 4, "fsdp": 4}, (4, 4), ("data", "fsdp"), 2),
        ("v5e", {"fsdp": 256}, (16, 16), ("fsdp",), 4),  # a whole pod: rings both ways
        ("v5e", {"data": 16, "fsdp": 16}, (16, 16), ("fsdp",), 2),
        ("v5p", {"fsdp": 64}, (4, 4, 4), ("fsdp",), 6),
        ("v5p", {"fsdp": 4}, (2, 2, 1), ("fsdp",), 2),
        ("v5p", {"fsdp": 32, "tensor": 2}, (4, 4, 4), ("tensor",), 1),  # half a side is no ring
        ("v5p", {"fsdp": 64}, (4, 4, 4), ("?",), 6),
    ],
)
def test_links_of_an_axis(chip, mesh, dims, axes, links):
    sent = {("all-gather", axes): Traffic(int(CHIPS[chip].link_bandwidth), 1, 0)}
    assert roofline(costs_of(collectives=sent), CHIPS[chip], mesh, dims).interconnect == {axes: 1 / links}


def test_collectives_over_the_same_axes_add_up():
    sent = {("all-gather", ("fsdp",)): Traffic(10**9, 1, 0), ("reduce-scatter", ("fsdp",)): Traffic(3 * 10**9, 1, 0)}
    line = roofline(costs_of(collectives=sent), CHIPS["v5e"], {"fsdp": 4}, (2, 2))
    assert line.interconnect == {("fsdp",): pytest.approx(4e9 / 100e9)}
    assert line.bound == "interconnect"


def test_between_slices():
    sent = costs_of(between={"all-reduce": Traffic(25 * 10**9 // 8, 1, 0)})
    mesh = {"data": 2, "fsdp": 16}
    assert roofline(sent, CHIPS["v5e"], mesh, (4, 4)).network == 1.0
    assert roofline(sent, CHIPS["v6e"], mesh, (4, 4)).network is None  # not published
    assert roofline(sent, CHIPS["v6e"], mesh, (4, 4), network_bandwidth=25e9).network == pytest.approx(1 / 8)


@pytest.mark.parametrize("axes, network", [(("tensor",), 0), (("data",), 1), (("data", "tensor"), 1)])
def test_gpus_of_several_hosts(axes, network):
    """data is 2 over tensor 8: its groups hold one GPU of each host."""
    sent = costs_of(collectives={("all-reduce", axes): Traffic(45 * 10**9, 1, 0)})
    line = roofline(sent, CHIPS["h100"], {"data": 2, "tensor": 8}, (16,))
    assert line.network == pytest.approx(0.9 * network)
    assert sum(line.interconnect.values()) == pytest.approx(0.0 if network else 0.1)


def test_rates():
    made = rates(2.0, CHIPS["v5e"], 16, tokens=10**6, model_flops=0.5 * 2 * 16 * 197e12, price_per_chip_hour=1.8)
    assert made.tokens_per_second == 5e5
    assert made.mfu == pytest.approx(0.5)
    assert made.cost_per_step == pytest.approx(16 * 2 / 3600 * 1.8)
    assert made.cost_per_billion_tokens == pytest.approx(16 * 2 / 3600 * 1.8 * 1000)
    nothing = rates(2.0, CHIPS["v5e"], 16)
    assert (nothing.tokens_per_second, nothing.mfu, nothing.cost_per_step) == (None, None, None)


def test_the_longest_bounds():
    line = Roofline(1.0, 2.0, {("a",): 1.5, ("b",): 1.0}, None)
    assert (line.bound, line.seconds) == ("interconnect", 2.5)
