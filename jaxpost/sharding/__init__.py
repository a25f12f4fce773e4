"""Mesh, rules, constraints: the only place that knows how arrays lie on devices."""

from jaxpost.sharding.hosts import fetch, host_rows, place
from jaxpost.sharding.memory import back, on_device, on_host
from jaxpost.sharding.mesh import make_mesh, platform
from jaxpost.sharding.rules import (
    RULES,
    batch_sharding,
    batch_shards,
    constrain,
    named_shardings,
    shardings_like,
    with_dtype,
)

__all__ = [
    "RULES",
    "back",
    "batch_sharding",
    "batch_shards",
    "constrain",
    "fetch",
    "host_rows",
    "make_mesh",
    "named_shardings",
    "on_device",
    "on_host",
    "place",
    "platform",
    "shardings_like",
    "with_dtype",
]
