"""An export by two hosts: processes of two simulated devices each, over which the weights are sharded."""

import os
import pathlib
import socket
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpost import embedded

REPOSITORY = pathlib.Path(__file__).parents[2]
HOST = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxpost.models import hf
from jaxpost.models.policy import Policy
from jaxpost.sharding import make_mesh, named_shardings
policy = Policy(hf.read_config(sys.argv[3]))
shardings = named_shardings(policy.axes(), make_mesh(fsdp=2, tensor=2), policy.abstract())
params = hf.load_params(sys.argv[3], policy, shardings, "bfloat16")
assert not params["embed"]["weight"].is_fully_addressable
hf.export(sys.argv[4], params, policy, {}, shard_bytes=500_000)
"""


@pytest.mark.slow
def test_weights_spread_over_hosts_are_written_whole(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    given, target = embedded.path("sft"), tmp_path / "out"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(host), str(given), str(target)],
            cwd=REPOSITORY,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    for host in hosts:
        _, said = host.communicate(timeout=300)
        assert host.returncode == 0, said
    files = sorted(target.glob("*.safetensors"))
    assert len(files) == 5  # 2.3 MB in files of at most 0.5 MB
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    wanted = load_file(given / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name], tensor)
