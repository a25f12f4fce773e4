"""What several tests of this room use."""

import jax
import pytest


@pytest.fixture
def tpu(monkeypatch):
    """Where arrays lie on one chip of v5e: for the TPU compiler, which needs no chip."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])
