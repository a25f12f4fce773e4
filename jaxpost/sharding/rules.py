"""Logical axes and where they lie on the mesh: declared once, checked always."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpost.errors import ConfigError

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("slices", "data", "fsdp", "expert"),
    "length": ("context",),
    "slots": (),
    "hidden": (),
    # weights
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),
    "scores": (),
    "rank": (),
    "vocab": ("tensor",),
    "norm": (),
}
# Copied on every device where their size does not divide: few kv heads over much tensor parallelism, odd vocabularies,
# a single token that decodes.
MAY_REPLICATE = ("kv_heads", "vocab", "length")


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """The spec of an array of `shape` with these logical axes (None = never split) on mesh axes of these sizes.

    Raises:
      ValueError: wrong rank, an unknown logical axis, or two dimensions on one mesh axis.
      ConfigError: a dimension does not divide by its mesh axes (except those of MAY_REPLICATE, which are copied).
    """
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {axes} name {len(axes)} dimensions, the array has shape {shape}")
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; known: {', '.join(RULES)}")
    named = [RULES[axis] if axis else () for axis in axes]
    used = [mesh_axis for mesh_axes in named for mesh_axis in mesh_axes]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} put two dimensions on one mesh axis ({named})")
    entries = []
    for axis, size, mesh_axes in zip(axes, shape, named, strict=True):
        parts = math.prod(sizes.get(mesh_axis, 1) for mesh_axis in mesh_axes)
        if size % parts:
            if axis not in MAY_REPLICATE:
                keys = " * ".join(f"mesh.{mesh_axis}={sizes.get(mesh_axis, 1)}" for mesh_axis in mesh_axes)
                raise ConfigError(f"{keys}: does not divide the axis {axis!r} of size {size} (array {axes} {shape})")
            mesh_axes = ()
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins x to the layout of its logical axes under the mesh of `jax.set_mesh`; without one only checks the axes."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(axes, x.shape, dict(mesh.shape))
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec)


def named_shardings(axes: Any, mesh: Mesh, abstract: Any) -> Any:
    """NamedSharding of every leaf of `abstract`, whose logical axes are the tuples of the tree `axes`."""
    sizes = dict(mesh.shape)
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, sizes)), abstract, axes
    )


def with_dtype(abstract: Any, dtype: Any) -> Any:
    """The tree of jax.ShapeDtypeStruct with the shapes of `abstract`, all of one type, lying nowhere."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the first dimension) over slices, data, fsdp and expert."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def shardings_like(param_shardings: Any, abstract_opt_state: Any, mesh: Mesh, abstract_params: Any) -> Any:
    """Shardings for an optimizer state: a moment lies where its parameter lies, everything else is copied.

    A leaf belongs to the parameter whose path ends its own path; where the shapes differ (factored moments of
    Adafactor) it is copied. Without this jit returns replicated moments.
    """
    paths = jax.tree_util.tree_leaves_with_path(param_shardings)
    shapes = jax.tree.leaves(abstract_params)
    owners = {path: (sharding, leaf.shape) for (path, sharding), leaf in zip(paths, shapes, strict=True)}
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        for start in range(len(path)):
            owner = owners.get(path[start:])
            if owner is not None:
                return owner[0] if owner[1] == leaf.shape else replicated
        return replicated

    return jax.tree_util.tree_map_with_path(place, abstract_opt_state)
