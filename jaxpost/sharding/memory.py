"""What waits in the host's memory: which arrays do their shardings say, and inside jit their types.

So no function need be told: `on_device` moves what lies there and leaves the rest alone.
"""

from typing import Any

import jax

KIND = "pinned_host"
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def on_host(shardings: Any) -> Any:
    """The same shardings, each shard in the memory of its device's host."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(KIND), shardings)


def on_device(tree: Any) -> Any:
    """The arrays, those of the host's memory copied to the devices. No computation takes any others."""
    return jax.tree.map(lambda x: jax.device_put(x, _DEVICE) if waits(x) else x, tree)


def back(tree: Any, like: Any) -> Any:
    """The arrays, those copied to the host's memory whose counterpart in `like` lies there."""
    return jax.tree.map(lambda x, was: jax.device_put(x, _HOST) if waits(was) else x, tree, like)


def waits(x) -> bool:
    """Whether an array lies in the host's memory."""
    return jax.typeof(x).memory_space == _HOST
