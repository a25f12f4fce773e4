"""Mesh, rules, constraints: the only place that knows how arrays lie on devices."""

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
    "batch_sharding",
    "batch_shards",
    "constrain",
    "make_mesh",
    "named_shardings",
    "platform",
    "shardings_like",
    "with_dtype",
]
