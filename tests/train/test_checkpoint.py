"""Checkpoints: bit-exact round trips, other meshes, damage, full disks, kill -9."""

import dataclasses
import functools
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import CheckpointError
from jaxpost.train.checkpoint import Checkpointer
from jaxpost.train.optimizer import make_optimizer
from jaxpost.types import TrainState

CONFIG = {"run": {"seed": 0}, "optimizer": {"freeze": ["embed"]}}
SETTINGS = types.SimpleNamespace(
    name="adamw", learning_rate=0.1, schedule="linear", warmup_steps=0, final_fraction=0.0, b1=0.9, b2=0.999, eps=1e-8,
    weight_decay=0.1, clip_norm=1.0, freeze=("embed",), no_decay=(), max_bad_steps=3,
)  # fmt: skip


def make_state(step=7, impl="threefry2x32", carry=None, size=5):
    """A state with bf16 leaves, -0.0, and a frozen leaf (so NamedTuples and masked nodes in the optimizer's state)."""
    shapes = {
        "embed": {"weight": jax.ShapeDtypeStruct((size, 4), jnp.bfloat16)},
        "layers": {"kernel": jax.ShapeDtypeStruct((8, size), jnp.float32)},
    }
    opt_shapes = jax.eval_shape(make_optimizer(SETTINGS, 10, shapes).transform.init, shapes)
    rng = np.random.default_rng(step)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape, scale=9).astype(x.dtype))  # noqa: E731
    params, opt_state = jax.tree.map(fill, (shapes, opt_shapes))
    params["layers"]["kernel"] = params["layers"]["kernel"].at[0].set(-0.0)
    return TrainState(jnp.int32(step), params, opt_state, jax.random.key(3, impl=impl), {} if carry is None else carry)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def bits(state):
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(raw(x)).tobytes(), state)


def assert_identical(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
    assert bits(got) == bits(want)


def saved(folder, *steps, size=5, **options):
    """A folder with the given steps in it."""
    with Checkpointer(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step, size=size), {"row": step * 10}, CONFIG)
    return folder


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("carry", [{}, {"mean": jnp.float32(0.1), "keys": jax.random.split(jax.random.key(1), 3)}])
def test_a_state_comes_back_to_the_bit(tmp_path, impl, carry):
    state, extra = make_state(impl=impl, carry=carry), {"window": 3, "best": 0.1, "counts": {"a": [1, 2]}}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(7, state, extra, CONFIG, eval_loss=1.5)
    with Checkpointer(tmp_path) as checkpoints:
        got, got_extra = checkpoints.restore(abstract(state))
        assert checkpoints.config() == CONFIG
        assert_identical(checkpoints.restore_params(abstract(state.params)), state.params)
    assert_identical(got, state)
    assert got_extra == extra


def test_what_is_saved_is_the_state_of_that_moment_though_its_buffers_are_donated(tmp_path):
    state = make_state(size=20_000)
    want, params = bits(state.params), jax.tree.map(jnp.copy, state.params)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x * 1.5 + 1, p), donate_argnums=0)
    step(jax.tree.map(jnp.copy, params))  # compiled before, so that the first donation meets the writing
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(7, dataclasses.replace(state, params=params), {}, CONFIG)
        for _ in range(5):
            params = step(params)
        got, _ = checkpoints.restore(abstract(state))
    assert bits(got.params) == want


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices.reshape(2, -1), ("data", "fsdp"))
    place = lambda spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))  # noqa: E731
    state = make_state()
    saved(tmp_path, 7)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(())), state)
    wanted.params["layers"]["kernel"] = jax.ShapeDtypeStruct((8, 5), jnp.float32, sharding=place(("fsdp",)))
    with Checkpointer(tmp_path) as checkpoints:
        got, _ = checkpoints.restore(wanted)
        assert_identical(got, state)
        assert got.params["layers"]["kernel"].sharding == place(("fsdp",))
        assert got.key.sharding == place(())
        checkpoints.save(8, dataclasses.replace(got, step=jnp.int32(8)), {}, CONFIG)
        back, _ = checkpoints.restore(abstract(state))
    assert_identical(back.params, state.params)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def largest_of_params(folder):
    """The file that holds the numbers."""
    return max((folder / "params").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def flip_a_bit(folder):
    """In the middle of the largest file of parameters, which is compressed random numbers."""
    path = largest_of_params(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "cut short": lambda folder: os.truncate(largest_of_params(folder), largest_of_params(folder).stat().st_size // 2),
    "all files empty": lambda folder: [os.truncate(path, 0) for path in files(folder)],
    "parameters gone": lambda folder: shutil.rmtree(folder / "params"),
    "no manifest": lambda folder: shutil.rmtree(folder / "manifest"),
    "a bit flipped": flip_a_bit,
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.fixture
def orbax_leftovers():
    """A failed orbax call leaves coroutines behind that complain when they are collected: here, not in other tests."""
    yield
    gc.collect()


def leaves_coroutines(test):
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("orbax_leftovers")(ignored(test))


@leaves_coroutines
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_step_is_passed_over_by_name_and_replaced(tmp_path, damage):
    # Trap 11: orbax lists such a step as the latest.
    make = functools.partial(make_state, size=500)
    saved(tmp_path, 10, 20, 30, size=500)
    damage(tmp_path / "30")
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest() == 30
        with pytest.warns(UserWarning, match=rf"^{tmp_path}/30 is damaged and passed over \("):
            got, extra = checkpoints.restore(abstract(make()))
        assert_identical(got, make(20))
        assert extra == {"row": 200}
        checkpoints.save(25, make(25), {}, CONFIG)
        assert checkpoints.steps() == [20, 25]  # 30 would be taken for the newest at the next start
        checkpoints.save(30, make(31), {}, CONFIG)
        assert_identical(checkpoints.restore(abstract(make()))[0], make(31))


@leaves_coroutines
def test_nothing_but_damage_is_an_error(tmp_path):
    saved(tmp_path, 10, 20)
    for step in ("10", "20"):
        DAMAGE["all files empty"](tmp_path / step)
    with Checkpointer(tmp_path) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(CheckpointError, match=rf"^{tmp_path}: step 10 is damaged \(.*\), and none is left"):
            checkpoints.restore(abstract(make_state()))
        with pytest.raises(CheckpointError, match=rf"^{tmp_path}: no checkpoint of step 15"):
            checkpoints.restore(abstract(make_state()), 15)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() is None and checkpoints.best() is None
        with pytest.raises(CheckpointError, match="no checkpoint there"):
            checkpoints.restore(abstract(make_state()))


def test_the_last_and_the_best_are_kept_also_after_a_restart(tmp_path):
    losses = {1: float("nan"), 2: 0.5, 3: None, 4: 3.0, 5: 2.0, 6: None}
    for steps in ((1, 2, 3), (4, 5, 6)):
        with Checkpointer(tmp_path, keep_last=2, keep_best=1) as checkpoints:
            for step in steps:
                checkpoints.save(step, make_state(step), {}, CONFIG, losses[step])
    with Checkpointer(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert (checkpoints.best(), checkpoints.latest()) == (2, 6)
        assert int(checkpoints.restore(abstract(make_state()), checkpoints.best())[0].step) == 2


def test_a_fresh_run_does_not_write_into_the_folder_of_another(tmp_path):
    saved(tmp_path, 10)
    with Checkpointer(tmp_path) as checkpoints:
        for step in (5, 10):
            with pytest.raises(CheckpointError, match=f"already holds step 10, so step {step} of this run"):
                checkpoints.save(step, make_state(step), {}, CONFIG)
        assert_identical(checkpoints.restore(abstract(make_state()))[0], make_state(10))


def changed(state, **changes):
    params = state.params | changes.pop("params", {})
    return dataclasses.replace(state, params=params, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"params": {"embed": {"weight": jax.ShapeDtypeStruct((6, 4), jnp.bfloat16)}}},
            r"params/embed/weight is bfloat16\[5, 4\] in the checkpoint, bfloat16\[6, 4\] in this run",
        ),
        (
            {"params": {"embed": {"weight": jax.ShapeDtypeStruct((5, 4), jnp.float32)}}},
            r"params/embed/weight is bfloat16\[5, 4\] in the checkpoint, float32\[5, 4\] in this run",
        ),
        ({"params": {"head": jax.ShapeDtypeStruct((2,), jnp.float32)}}, "params/head is absent in the checkpoint"),
        ({"params": {"layers": {}}}, r"params/layers/kernel is float32\[8, 5\] in the checkpoint, absent in this run"),
        ({"carry": {"mean": jax.ShapeDtypeStruct((), jnp.float32)}}, "carry/mean is absent in the checkpoint"),
        (
            {"key": jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))},
            r"key/value is key<fry>\[\] in the checkpoint",
        ),
    ],
    ids=["shape", "type", "missing", "too many", "carry", "key"],
)
def test_a_checkpoint_of_other_leaves_is_refused_by_name(tmp_path, changes, message):
    saved(tmp_path, 10, 20)
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=rf"^{tmp_path}/20: {message}"):
        checkpoints.restore(changed(abstract(make_state()), **changes))


@leaves_coroutines
def test_a_full_disk_leaves_the_previous_step_and_one_line(tmp_path, caplog):
    saved(tmp_path, 10, keep_last=1, keep_best=0)
    big = make_state(20, size=200_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpointer(tmp_path, keep_last=1, keep_best=0)
    checkpoints.restore(abstract(make_state()))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(20, big, {}, CONFIG)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert message == f"{tmp_path}: saving a checkpoint failed (File too large); step 10 is still there"
    assert not [record for record in caplog.records if "orbax" in record.pathname]  # it logs 400 lines for this
    checkpoints.save(30, make_state(30), {}, CONFIG)  # space again: the run could have gone on
    checkpoints.wait()
    assert checkpoints.steps() == [30]
    checkpoints.close()


KILLED = """
import sys
from tests.train.test_checkpoint import CONFIG, make_state
from jaxpost.train.checkpoint import Checkpointer
checkpoints = Checkpointer(sys.argv[1], keep_last=1, keep_best=0)
checkpoints.save(10, make_state(10), {"row": 100}, CONFIG)
checkpoints.wait()
print("saving", flush=True)
checkpoints.save(20, make_state(20, size=500_000), {}, CONFIG)
checkpoints.wait()
print("saved", flush=True)
"""


def test_kill_9_in_the_middle_of_saving_leaves_a_restorable_folder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "saving\n"
        while not (begun := [path for path in tmp_path.iterdir() if path.name.startswith("20") and files(path)]):
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        assert child.communicate()[0] == "" and child.returncode == -signal.SIGKILL
    assert [path.name for path in begun] != ["20"] and not (tmp_path / "20").exists()
    with Checkpointer(tmp_path, read_only=True) as checkpoints:  # as `jaxpost chat` may look into a run that goes on
        assert_identical(checkpoints.restore(abstract(make_state()))[0], make_state(10))
        assert all(path.exists() for path in begun)
    with Checkpointer(tmp_path) as checkpoints:
        got, extra = checkpoints.restore(abstract(make_state()))
        assert_identical(got, make_state(10))
        assert extra == {"row": 100}
        checkpoints.save(30, make_state(30), {}, CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "30"]  # and no leftovers of the killed one


def test_looking_into_a_folder_that_is_not_there_makes_none(tmp_path):
    with Checkpointer(tmp_path / "none", read_only=True) as checkpoints, pytest.raises(CheckpointError):
        checkpoints.config()
    assert not (tmp_path / "none").exists()
