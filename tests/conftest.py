"""What every test runs under: 8 simulated CPU devices, a cache folder of its own, strict promotion in our own rooms.

The environment is set before jax is first imported, and reaches the processes that tests start.
"""

import contextlib
import os

import pytest

DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
# Threads for programs, by default as many as devices: collectives of one program that wait for each other, each in a
# thread of its own, then leave none for the device that they wait for, and jax aborts.
os.environ["PJRT_NPROC"] = str(4 * DEVICES)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()

# Rooms of pure array code. Elsewhere optax (Adam's `decay**count`) and Flax promote by themselves.
STRICT_DTYPES = {"losses", "rl", "ops"}
STRICT_RANKS = {"losses", "rl", "ops"}


@pytest.fixture(scope="module", autouse=True)
def strict_promotion(request):
    """jax promotes neither dtypes nor ranks implicitly in the tests of the rooms above."""
    room = request.path.parent.name
    with contextlib.ExitStack() as stack:
        if room in STRICT_DTYPES | STRICT_RANKS:
            import jax

            stack.enter_context(jax.numpy_dtype_promotion("strict" if room in STRICT_DTYPES else "standard"))
            stack.enter_context(jax.numpy_rank_promotion("raise" if room in STRICT_RANKS else "allow"))
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory):
    """Compiled programs and reference log-probabilities of tests never reach the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
