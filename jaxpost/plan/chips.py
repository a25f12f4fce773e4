"""What is published of TPUs and GPUs, each figure with its source; the TPU compiler for slices that are not here."""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
from collections.abc import Iterator

from jaxpost.errors import ConfigError

GIB = 1 << 30
_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_LIMIT = "what the TPU compiler of jax 0.10.2 grants: 'exceeds available HBM (...)' of a program that does not fit"
_FRACTION = "75 %, what jax takes at start: https://docs.jax.dev/en/latest/gpu_memory_allocation.html"
_LINKS = ", in both directions, over its links and two"
_V4_PAPER = "Jouppi et al. 2023, arXiv:2304.01433: 6 links of 50 GB/s"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_CARD = "a 400 Gbit/s card a GPU, as in systems of https://github.com/mlcommons/inference_results_v6.0; others differ"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip, which jax shows as one device. Rates are a second, sizes bytes; None: not published.

    flops: dense bf16. usable_bytes: memory that programs get. link_bandwidth: received over one link of the torus
    (TPU), or over all of NVLink (GPU). dims: of the torus; 0 where a switch joins the chips of a host.
    network_bandwidth: received from other slices or hosts, a chip. sources: where each figure is from.
    """

    name: str
    platform: str
    flops: float
    memory_bytes: int
    usable_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    dims: int
    network_bandwidth: float | None
    chips_per_host: int
    sources: dict[str, str]


def _tpu(name: str, flops, memory, usable, bandwidth, link, dims, network, per_host, **sources) -> Chip:
    page = f"{_TPU_DOCS}{name}"
    cited = dict.fromkeys(("flops", "memory_bytes", "memory_bandwidth"), page)
    cited |= {"link_bandwidth": page + _LINKS, "usable_bytes": _LIMIT} | sources
    cited |= {"network_bandwidth": page} if network else {}
    return Chip(name, "tpu", flops, memory, int(usable * GIB), bandwidth, link, dims, network, per_host, cited)


def _gpu(name: str, flops, memory, bandwidth, link, network, page: str) -> Chip:
    cited = dict.fromkeys(("flops", "memory_bytes", "memory_bandwidth", "link_bandwidth"), _NVIDIA + page)
    cited |= {"usable_bytes": _FRACTION} | ({"network_bandwidth": _CARD} if network else {})
    return Chip(name, "gpu", flops, int(memory), int(0.75 * memory), bandwidth, link, 0, network, 8, cited)


# Dense bf16 FLOP/s; memory, as published and as the compiler grants it (GiB); bytes/s of memory, a link, the network.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275e12, 32 * GIB, 30.75, 1.2e12, 50e9, 3, None, 4, link_bandwidth=_V4_PAPER),
        _tpu("v5e", 197e12, 16 * GIB, 15.75, 819e9, 50e9, 2, 25e9 / 8, 8),  # 400 GB/s, 4 links; 2 x 100 Gbit/s a host
        _tpu("v5p", 459e12, 95 * GIB, 95.74, 2765e9, 100e9, 3, 50e9 / 8, 4),  # 1,200 GB/s, 6 links; 50 Gbit/s a chip
        _tpu("v6e", 918e12, 32 * GIB, 31.25, 1638e9, 100e9, 2, None, 8),  # 800 GB/s, 4 links
        _gpu("a100-40", 312e12, 40e9, 1555e9, 300e9, None, "a100/ (SXM)"),
        _gpu("a100-80", 312e12, 80e9, 2039e9, 300e9, None, "a100/ (SXM)"),
        _gpu("h100", 989e12, 80e9, 3.35e12, 450e9, 50e9, "h100/ (SXM)"),
        _gpu("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9, "h200/ (SXM)"),
        _gpu("b200", 2250e12, 180e9, 8e12, 900e9, 50e9, "hgx/ (HGX B200, a GPU)"),
    )
}
# Slices that Google Cloud offers, https://docs.cloud.google.com/tpu/docs/supported-tpu-configurations: of v4 and v5p
# these and AxBxC in multiples of 4, A <= B <= C, of so many chips at most.
_SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SLICES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_MOST_CHIPS = {"v4": 4096, "v5p": 6144}


def slices_of(chip: str) -> list[str]:
    """Names of the topologies of a TPU generation, without the chip's."""
    if chip not in _MOST_CHIPS:
        return list(_SLICES_2D)
    sides = range(4, 25, 4)
    cubes = [c for c in itertools.combinations_with_replacement(sides, 3) if math.prod(c) <= _MOST_CHIPS[chip]]
    cubes.sort(key=lambda cube: (math.prod(cube), cube))
    return [*_SLICES_3D, *("x".join(map(str, cube)) for cube in cubes)]


def describe(name: str) -> tuple[Chip, int]:
    """(chip, devices) of a topology: `v5e:4x4`, or of GPUs `h100:8`, so many with eight a host.

    Raises ConfigError for one that does not exist, listing those that do.
    """
    chip_name, _, layout = name.partition(":")
    chip = CHIPS.get(chip_name)
    if chip is None:
        raise ConfigError(f"topology {name}: no chip {chip_name!r}; there are {', '.join(CHIPS)}: v5e:4x4, h100:8")
    if chip.platform == "gpu":
        count = int(layout) if layout.isdigit() else 0
        if count not in (1, 2, 4) and (count < 8 or count % chip.chips_per_host):
            raise ConfigError(f"topology {name}: GPUs come as 1, 2, 4, 8 or a multiple of 8, as in {chip_name}:8")
        return chip, count
    known = slices_of(chip_name)
    if layout not in known:
        listed = ", ".join(known) if len(known) < 10 else f"{', '.join(known[:8])}, ..., {known[-1]}"
        rule = " (beyond 4x4x4: multiples of 4 in rising order)" if chip_name in _MOST_CHIPS else ""
        raise ConfigError(f"topology {name}: {chip_name} comes as {listed}{rule}")
    return chip, math.prod(dimensions(name))


def dimensions(name: str) -> tuple[int, ...]:
    """Sides of a topology's torus; of GPUs their number."""
    return tuple(int(side) for side in name.partition(":")[2].split("x"))


def open_topology(name: str, slices: int = 1) -> list:
    """Devices of `slices` slices of a TPU topology, to compile for: `Mesh(np.array(devices).reshape(...), axes)`.

    They are in order of slices, so that a mesh's first axis is what crosses them. Nothing of this machine's own devices
    is touched, and what libtpu writes to stderr while it loads (that it finds no TPU) is dropped.
    Raises ConfigError for a topology that does not exist, for GPUs, and where libtpu is not installed.
    """
    chip, _ = describe(name)
    if chip.platform != "tpu":
        raise ConfigError(f"topology {name}: there is a compiler without the hardware for TPUs only")
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise ConfigError(f"topology {name}: the TPU compiler (libtpu) is missing; pip install 'jaxpost[tpu]'")
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]  # by default hosts of 2x2 chips, which 1x1 does not divide into
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # as on Cloud TPU VMs: a chip's two cores are one device
    with _loading():
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    return sorted(devices, key=lambda device: getattr(device, "slice_index", 0) or 0)


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """libtpu without a TPU: does not ask the cloud's metadata server, may be loaded by several processes, is silent.

    Both settings hold while it loads and only where the user set none, so that a TPU of this machine works as before.
    """
    unset = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    unset = {key: value for key, value in unset.items() if key not in os.environ}
    os.environ.update(unset)
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        for key in unset:
            os.environ.pop(key, None)
