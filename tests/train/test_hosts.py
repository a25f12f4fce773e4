"""Runs of several hosts, as processes of four simulated devices on loopback: equal to one process, stopped, killed."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxpost
from jaxpost import config as configs
from jaxpost.errors import HostError
from jaxpost.keys import HostsConfig
from jaxpost.sharding import fetch, host_rows, make_mesh, place
from jaxpost.train import hosts, scoring, watchdog
from jaxpost.train.checkpoint import Checkpointer
from jaxpost.train.folder import choose_folder, write_config
from tests.worlds import dpo_config, write_model, write_pairs

REPOSITORY = pathlib.Path(__file__).parents[2]
SILENCE_S = 15  # after which a host counts as dead
TIMED = {"tokens_per_second", "data_wait_share"}
# The command line, whose host sends itself a signal after the row of a step, and from there on takes its time.
HOST = """
import os, sys, time
from jaxpost.cli import main
from jaxpost.train.loop import Loop
at, number, *arguments = sys.argv[1:]
write = Loop.write
def struck(self, step, *rest):
    write(self, step, *rest)
    if step == int(at):
        os.kill(os.getpid(), int(number))
    if step >= int(at):
        time.sleep(1)
if int(at):
    Loop.write = struck
sys.exit(main(["train", *arguments]))
"""


def start(config: dict, count: int, struck: tuple[int, int, int] = (0, 0, 0), **of_second) -> list[tuple[int, str]]:
    """(exit code, what it said on stderr) of each of `count` hosts of four devices.

    struck: (host, step, signal). of_second: keys of the second host alone, with __ for dots.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    file = pathlib.Path(config["run"]["dir"]).with_suffix(".py")
    file.write_text(f"def get_config():\n    return {config!r}\n")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    started = []
    for host in range(count):
        given = {"timeout_s": 60, "silence_s": SILENCE_S, "coordinator": address, "count": count, "index": host}
        keys = {f"hosts.{name}": value for name, value in given.items()} if count > 1 else {}
        keys |= {name.replace("__", "."): value for name, value in of_second.items()} if host == 1 else {}
        flags = [f"--config={file}", *(f"--config.{name}={value}" for name, value in keys.items())]
        when = [str(struck[1]), str(struck[2])] if host == struck[0] else ["0", "0"]
        command = [sys.executable, "-c", HOST, *when, *flags]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes))
    said = [process.communicate(timeout=300)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def succeeded(ended):
    for code, said in ended:
        assert code == 0, said


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """run folder -> config of six steps, checkpoints after every second."""
    folder = tmp_path_factory.mktemp("hosts")
    files = write_model(folder / "model"), write_pairs(folder / "pairs.jsonl")

    def make(name, **run):
        found = dpo_config(*files, folder / name, checkpoint_every=2, keep_last=9, **run)
        return found | {"reference": {"cache_dir": str(folder / f"cache-{name}")}}

    return make


@pytest.fixture(scope="module")
def whole(config):
    """The folder of a run of two hosts that was never stopped."""
    succeeded(start(config("whole", eval_every=3, eval_prompts=2, eval_new_tokens=4, export=True), 2))
    return pathlib.Path(config("whole")["run"]["dir"])


@pytest.fixture(scope="module")
def alone(config):
    """The same in this process of eight devices."""
    return jaxpost.run(config("alone", eval_every=3, eval_prompts=2, eval_new_tokens=4))


def rows_of(folder) -> list[dict]:
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def same_rows(ours, theirs):
    """Losses to 1e-6: sums over devices in another order; other metrics, of up to 200 nats, to 1e-6 of them or 1e-5."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            tolerance = {"rtol": 0, "atol": 1e-6} if name.endswith("loss") else {"rtol": 1e-6, "atol": 1e-5}
            np.testing.assert_allclose(mine[name], other[name], **tolerance, err_msg=name)


def state_of(folder, like, step=None):
    """(TrainState as numpy, extra) of a checkpoint."""
    with Checkpointer(pathlib.Path(folder) / "checkpoints", read_only=True) as checkpoints:
        state, extra = checkpoints.restore(like, step)
    return [fetch(x) for x in jax.tree.leaves((state.params, state.opt_state, state.step))], extra


def arrays_of(state):
    return [fetch(x) for x in jax.tree.leaves((state.params, state.opt_state, state.step))]


@pytest.mark.slow
class TestTwoHosts:
    def test_they_learn_what_one_learns(self, whole, alone):
        assert [row["step"] for row in rows_of(whole)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
        same_rows(rows_of(whole), rows_of(alone.folder))
        assert json.loads((whole / "before.json").read_text())["samples"]

    def test_they_leave_the_same_checkpoint(self, whole, alone):
        state, extra = state_of(whole, alone.state)
        for mine, other in zip(state, arrays_of(alone.state), strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)
        assert extra == state_of(alone.folder, alone.state)[1]

    def test_one_of_them_writes(self, whole):
        assert json.loads((whole / "config.json").read_text())["hosts"]["index"] == 0
        assert (whole / "export" / "model.safetensors").exists()
        assert not (whole / ".hosts").exists()

    def test_stopped_by_sigterm_killed_and_resumed_on_half_the_devices(self, config, whole, alone):
        """SIGTERM to one host saves on both; the restart repeats the run to the bit, until one is killed, which ends
        the other; one process of four devices, as another mesh, goes on from there."""
        part = config("part", eval_every=3)
        ended = start(part, 2, struck=(1, 2, signal.SIGTERM))
        succeeded(ended)
        folder = pathlib.Path(part["run"]["dir"])
        stopped = max(row["step"] for row in rows_of(folder))
        assert 2 <= stopped < 5
        assert f"SIGTERM: saved at step {stopped}" in ended[0][1]
        ours, theirs = (state_of(of, alone.state, 2)[0] for of in (folder, whole))
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, other)

        part["run"]["resume"] = True
        (code, said), (its_code, _) = start(part, 2, struck=(1, 5, signal.SIGKILL))
        assert its_code == -signal.SIGKILL
        assert code == watchdog.GONE, said
        line = last_line(said)
        assert line.startswith("error: host 1 has given no sign of life for ") and "run.resume=True" in line
        assert SILENCE_S <= float(line.split("for ")[1].split(" s")[0]) <= SILENCE_S + 10
        rows = rows_of(folder)
        assert rows[-1]["step"] in (4, 5)  # the first host writes a row a step later
        assert rows == rows_of(whole)[: len(rows)]

        succeeded(start(part | {"mesh": {"data": 2, "fsdp": 2}}, 1))
        same_rows(rows_of(folder), rows_of(alone.folder))

    def test_other_configs_end_both_with_a_line(self, config):
        ended = start(config("other"), 2, optimizer__learning_rate=0.5)
        for code, said in ended:
            assert code == 2
            differs = "optimizer.learning_rate: 0.5 on host 1, 0.001 on host 0"
            assert last_line(said) == f"error: {differs}; all hosts must be given the same config"
        assert not pathlib.Path(config("other")["run"]["dir"]).exists()

    def test_one_that_waits_alone_says_so(self, config):
        alone = config("missing") | {
            "hosts": {"coordinator": "localhost:1", "count": 2, "index": 1, "timeout_s": 3.0},
        }
        ((code, said),) = start(alone, 1)
        assert code == 2
        assert last_line(said) == (
            "error: hosts.timeout_s: not all hosts joined at localhost:1 within 3 s (this is host 1 of 2)"
        )


def given(**changes):
    part = {"config": {"a": 1, "b": (1,)}, "code": {"jaxpost": "x"}, "version": {"jax": "1"}}
    return part | {"devices": {"local": 4}} | changes


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"config": {"a": 2, "b": (1,)}}, "a: 2 on host 1, 1 on host 0; all hosts must be given the same config"),
        ({"config": {"b": (1,)}}, "a: None on host 1, 1 on host 0; all hosts must be given the same config"),
        (
            {"code": {"jaxpost": "y"}},
            "hosts: the code of jaxpost on host 1 is not that on host 0 (y, x); install the same",
        ),
        ({"version": {"jax": "2"}}, "hosts: jax is 2 on host 1, 1 on host 0; install the same"),
        ({"devices": {"local": 2}}, "hosts: host 1 sees 2 local devices, host 0 4; all must see the same number"),
    ],
)
def test_what_differs_between_hosts_is_named(changes, line):
    hosts._compare([given(), given()])
    with pytest.raises(HostError) as error:
        hosts._compare([given(), given(**changes)])
    assert str(error.value) == line


def test_calls_of_a_function_are_spread_over_hosts(monkeypatch):
    """Each of three hosts makes every third call; values and faults come back in the order of the calls."""
    calls = [(n,) for n in range(8)]

    def function(part):
        faults = {i: "odd" for i, (n,) in enumerate(part) if n == 5}
        return np.array([np.nan if n == 5 else n / 2 for (n,) in part]), faults

    answers = []

    def gave(value):
        answers.append(value)
        raise InterruptedError

    for host in range(3):
        monkeypatch.setattr(hosts, "count", lambda: 3)
        monkeypatch.setattr(hosts, "index", lambda host=host: host)
        monkeypatch.setattr(hosts, "gathered", gave)
        with pytest.raises(InterruptedError):
            scoring._spread(function, calls)
    monkeypatch.setattr(hosts, "gathered", lambda value: json.loads(json.dumps(answers)))
    values, faults = scoring._spread(function, calls)
    np.testing.assert_array_equal(values, [0, 0.5, 1, 1.5, 2, np.nan, 3, 3.5])
    assert faults == {5: "odd"}


def test_rows_are_placed_and_fetched():
    mesh = make_mesh(fsdp=4, tensor=2)
    rows = host_rows(mesh, 8)
    assert rows == slice(0, 8)
    batch = {"x": np.arange(16).reshape(8, 2)}
    placed = place(batch, mesh, rows, 8)
    assert placed["x"].sharding.shard_shape((8, 2)) == (2, 2)
    np.testing.assert_array_equal(fetch(placed)["x"], batch["x"])


class TestWatchdog:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch):
        monkeypatch.setattr(watchdog, "EVERY_S", 0.02)

    def test_it_names_phase_step_and_place(self, capfd):
        with watchdog.Watchdog(HostsConfig(step_timeout_s=0.2)):
            time.sleep(0.5)  # before the first step nothing is bounded
            watchdog.enter("data", 3)
            time.sleep(0.6)
            watchdog.enter("update", 3)
        said = capfd.readouterr().err
        assert said.count("hosts.step_timeout_s: host 0 is in data of step 3 for ") == 1
        assert "test_it_names_phase_step_and_place" in said  # the stack
        assert "update" not in said

    def test_it_may_end_the_process(self, capfd, monkeypatch):
        codes = []
        monkeypatch.setattr(os, "_exit", codes.append)
        with watchdog.Watchdog(HostsConfig(step_timeout_s=0.1, on_step_timeout="end")):
            watchdog.enter("scoring", 7)
            time.sleep(0.5)
        assert codes == [watchdog.HUNG]
        assert "scoring of step 7" in capfd.readouterr().err


def test_a_run_may_go_on_over_other_devices_and_hosts(tmp_path):
    values = {"stage": "sft", "model": {"path": "x"}, "data": {"train": "x"}, "run": {"steps": 1}}
    values["run"] |= {"dir": str(tmp_path / "run")}
    many = {"hosts": {"coordinator": "a:1", "count": 2, "index": 0}, "mesh": {"fsdp": 8}}
    write_config(tmp_path / "run", configs.resolve(values | many))
    resumed = configs.resolve(values | {"run": values["run"] | {"resume": True}, "mesh": {"fsdp": 4}})
    assert choose_folder(resumed) == (tmp_path / "run", True)
