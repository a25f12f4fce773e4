"""The device mesh."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxpost.errors import ConfigError

# As devices are dealt out: slices apart, neighbours along `tensor`.
AXES = ("slices", "data", "fsdp", "expert", "context", "tensor")


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    expert: int = 1,
    context: int = 1,
    slices: int = 1,
    devices: Sequence | None = None,
) -> Mesh:
    """A mesh of AXES over `devices` (default: all of them). One size may be -1: the rest.

    slices: copies of everything that only gradients cross: TPU slices, joined by a data-centre network. data: rows are
    split, weights copied. fsdp: rows and weights are split. expert: rows are split, and the experts of a mixture; its
    other weights are copied. context: the tokens of a row are split, and weights as along fsdp. tensor: heads, MLP and
    vocabulary are split.

    Raises:
      ConfigError: a size is neither positive nor -1, two are -1, their product is not the number of devices, or the
        devices lie in another number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"slices": slices, "data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"mesh.{name}: {size} is not a size; give 1 or more, or -1 for the rest of the devices")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"{' and '.join(f'mesh.{name}' for name in free)} are both -1; only one can be the rest")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise ConfigError(f"{asked}: the product must {'divide' if free else 'be'} the {len(devices)} devices")
    for name in free:
        sizes[name] = len(devices) // fixed
    groups = _slices(devices)
    if len(groups) not in (1, sizes["slices"]):
        raise ConfigError(f"mesh.slices: {sizes['slices']}, but the devices lie in {len(groups)} slices")
    shape = (sizes["slices"] // len(groups), *list(sizes.values())[1:])
    laid = np.concatenate([_laid(shape, group) for group in groups])
    # Auto: with jax.make_mesh's default (Explicit) a plain gather fails.
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid(shape: tuple[int, ...], devices: Sequence) -> np.ndarray:
    """The devices of a slice in this shape, neighbours in the mesh being neighbours on the wires where that can be."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis of the mesh that is no product of sides of the torus: it shares some
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _slices(devices: Sequence) -> list[list]:
    """The devices of each TPU slice."""
    groups: dict[int, list] = {}
    for device in devices:
        own = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        groups.setdefault(own, []).append(device)
    return [groups[index] for index in sorted(groups)]


def platform(mesh: Mesh) -> str:
    """Where programs over this mesh run: cpu, gpu or tpu. Of a plan that is not where they are compiled."""
    return mesh.devices.flat[0].platform
