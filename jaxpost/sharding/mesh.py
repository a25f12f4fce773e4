"""The device mesh."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from jaxpost.errors import ConfigError

AXES = ("data", "fsdp", "expert", "tensor")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, expert: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh (data, fsdp, expert, tensor) over `devices` (default: all of them). One size may be -1: the rest.

    data: rows are split, weights copied. fsdp: rows and weights are split. expert: rows are split, and the experts of
    a mixture; its other weights are copied. tensor: heads, MLP and vocabulary are split.

    Raises:
      ConfigError: a size is neither positive nor -1, two are -1, or their product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
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
    # Auto: with jax.make_mesh's default (Explicit) a plain gather fails.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
