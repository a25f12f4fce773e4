"""How fast a program could run at best: its costs over what a chip can do, and what that makes of tokens and money."""

import dataclasses
import math
from collections.abc import Iterable

from jaxpost.plan.chips import Chip
from jaxpost.plan.hlo import Costs


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a call takes at least in each respect, were it alone; a real one takes longer than the longest.

    interconnect: {axes: seconds} of the collectives within a slice or a host. network: between slices, or hosts of
    GPUs; None where the chip's is not published and something is sent.
    """

    compute: float
    memory: float
    interconnect: dict[tuple[str, ...], float]
    network: float | None

    @property
    def limits(self) -> dict[str, float]:
        """{"compute", "memory", "interconnect", "network": seconds}; collectives over different axes take turns."""
        found = {"compute": self.compute, "memory": self.memory, "interconnect": sum(self.interconnect.values())}
        return found | ({"network": self.network} if self.network is not None else {})

    @property
    def seconds(self) -> float:
        """If all overlaps: the longest."""
        return max(self.limits.values())

    @property
    def serial_seconds(self) -> float:
        """If nothing overlaps: the sum."""
        return sum(self.limits.values())

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.limits, key=self.limits.get)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a step of `seconds` makes; None where tokens, model FLOPs or a price were not given."""

    seconds: float
    tokens_per_second: float | None
    mfu: float | None  # model FLOPs over what all chips could do in that time
    cost_per_step: float | None  # in the price's currency
    cost_per_billion_tokens: float | None


def roofline(
    costs: Costs,
    chip: Chip,
    mesh_shape: dict[str, int],
    dims: tuple[int, ...],
    network_bandwidth: float | None = None,
) -> Roofline:
    """Least seconds of a call of a program with `costs` (`plan.hlo`), on chips in a torus of sides `dims`.

    mesh_shape: {axis: size} of the whole mesh. dims: `chips.dimensions(name)`; ignored for GPUs.
    network_bandwidth: bytes a second and chip between slices or hosts, where the chip's is not published or differs.
    A collective over several axes, or over one that lies along several sides of the torus, is taken to use the links of
    all of them: the best case. Axes that could not be told ("?") are taken to be all.
    """
    network = network_bandwidth or chip.network_bandwidth
    across = math.prod(mesh_shape.values()) // math.prod(dims) if chip.platform == "tpu" else 1
    local = _within_slice(mesh_shape, across)
    interconnect, sent = {}, sum(traffic.bytes for traffic in costs.between_slices.values())
    for (_, axes), traffic in costs.collectives.items():
        named = tuple(local) if axes == ("?",) else axes
        if chip.platform == "gpu" and _leaves_host(local, named, chip.chips_per_host):
            sent += traffic.bytes
            continue
        rate = chip.link_bandwidth
        if chip.platform == "tpu":
            rate *= _links(chip, math.prod(local[axis] for axis in named), dims)
        interconnect[axes] = interconnect.get(axes, 0.0) + traffic.bytes / rate
    return Roofline(
        compute=costs.flops / chip.flops,
        memory=costs.hbm_bytes / chip.memory_bandwidth,
        interconnect=interconnect,
        network=sent / network if network else (None if sent else 0.0),
    )


def rates(
    seconds: float,
    chip: Chip,
    devices: int,
    *,
    tokens: int | None = None,
    model_flops: float | None = None,
    price_per_chip_hour: float | None = None,
) -> Rates:
    """What a step of `seconds` on `devices` chips makes.

    tokens: of a step, all devices together. model_flops: of a step, those that the model needs (no recomputation).
    """
    cost = None if price_per_chip_hour is None else price_per_chip_hour * devices * seconds / 3600
    return Rates(
        seconds=seconds,
        tokens_per_second=None if tokens is None else tokens / seconds,
        mfu=None if model_flops is None else model_flops / (seconds * devices * chip.flops),
        cost_per_step=cost,
        cost_per_billion_tokens=None if cost is None or not tokens else cost / tokens * 1e9,
    )


def _within_slice(mesh_shape: dict[str, int], slices: int) -> dict[str, int]:
    """The mesh of one slice: its first axes are what crosses them."""
    local = {}
    for name, size in mesh_shape.items():
        shared = math.gcd(size, slices)
        local[name], slices = size // shared, slices // shared
    return local


def _links(chip: Chip, devices: int, dims: Iterable[int]) -> int:
    """Links over which a chip receives in a collective of so many devices.

    They are laid along the fewest sides of the torus, longest first, that hold them; two links a side where it closes
    to a ring and they fill it, else one (a line's ends have one neighbour). A side closes where all are multiples of 4
    (v4, v5p: Google's page of v5p says it of "all 4x4x4 and larger slices"), or where it is a whole pod's 16 (v5e,
    v6e: not stated of smaller slices, so the lower).
    """
    sides, held, links = sorted(dims, reverse=True), 1, 0
    cubes = all(side % 4 == 0 for side in sides)
    for side in sides:
        if held >= devices or side == 1:
            break
        fills = devices % (held * side) == 0
        closed = cubes if chip.dims == 3 else side == 16
        links += 2 if closed and fills else 1
        held *= side
    return max(links, 1)


def _leaves_host(mesh_shape: dict[str, int], axes: tuple[str, ...], chips_per_host: int) -> bool:
    """Whether groups over `axes` hold devices of several hosts, devices being numbered row-major over the mesh."""
    stride, span = 1, 1
    for name in reversed(mesh_shape):
        if name in axes and mesh_shape[name] > 1:
            span += stride * (mesh_shape[name] - 1)
        stride *= mesh_shape[name]
    return span > chips_per_host
