"""Arrays of a mesh that several processes share: each gives its rows, and each may ask for the whole.

In one process all of this is `jax.device_put` and `jax.device_get`.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxpost.sharding.rules import batch_sharding


def host_rows(mesh: Mesh, rows: int) -> slice:
    """The smallest range of a batch's rows that holds all those of this process's devices.

    Where the devices of a process are no neighbours on the row axes of the mesh, as on some TPU slices, it holds
    rows of others too, which `place` leaves out.
    """
    if jax.process_count() == 1:
        return slice(0, rows)
    found = [index[0].indices(rows) for index in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()]
    return slice(min(start for start, _, _ in found), max(stop for _, stop, _ in found))


def place(batch: Any, mesh: Mesh, rows: slice | None = None, total: int | None = None) -> Any:
    """A tree of numpy arrays [B, ...] on the devices, split over the mesh by rows.

    rows: which of the `total` rows of the whole batch these are, as `host_rows` says; None: all.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    first = 0 if rows is None else rows.start

    def put(x):
        x = np.asarray(x)
        shape = (len(x) if rows is None else total, *x.shape[1:])

        def part(index):
            start, stop, _ = index[0].indices(shape[0])
            return x[start - first : stop - first]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch)


def fetch(tree: Any) -> Any:
    """The tree as numpy arrays, whole on every process. All must call, for the same arrays in the same order."""

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))
