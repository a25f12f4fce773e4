"""Dry runs against the commands as documented, and the commands executed with stubs on PATH."""

import pathlib
import shlex
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
NASTY = """--config.data.train=['it''s "a" $HOME $(x).jsonl','b & c\\n;`d`']"""
JAXPOST = ["--config=configs/dpo.py", "--config.run.dir=gs://bucket/run", NASTY]
RESUMED = ["--config.run.resume=True", *JAXPOST]
TPU = ["--name=n", "--zone=z", "--topology=v5e:4x4"]
ON_HOST = "bash jaxpost-launch/src/launch/host.sh"
UNPACK = "rm -rf jaxpost-launch/src && mkdir -p jaxpost-launch/src && tar -xzf jaxpost-launch.tgz -C jaxpost-launch/src"


def launch(script, *arguments, path="/usr/bin:/bin", **env):
    """A launcher's process; PATH holds nothing of the clouds unless a test puts stubs there."""
    env = {"PATH": path, "HOME": "/nowhere", **env}
    return subprocess.run(["bash", LAUNCH / script, *arguments], env=env, capture_output=True, text=True, timeout=60)


def dry(script, *arguments):
    """The commands of a dry run, as lists of arguments."""
    done = launch(script, *arguments, "--dry-run", "--", *JAXPOST)
    if done.returncode == 2 and "takes no config" in done.stderr:
        done = launch(script, *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def ssh(command, worker="all", node="n"):
    where = ["--zone=z", "--quiet", f"--worker={worker}", f"--command={command}"]
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *where]


TPUS = ["gcloud", "compute", "tpus"]
SHAPE = "--accelerator-type=v5litepod-16"
RUNTIME = "version=v2-alpha-tpuv5-lite"
QUEUED = ["--node-id=n", "--valid-until-duration=60m"]
VERBS = {
    "install": [ssh(f"{ON_HOST} install tpu")],
    "stop": [ssh(f"{ON_HOST} stop")],
    "logs": [ssh(f"{ON_HOST} log", worker="0")],
    "delete": [[*TPUS, "tpu-vm", "delete", "n", "--zone=z", "--quiet"]],
    "create": [[*TPUS, "tpu-vm", "create", "n", "--zone=z", SHAPE, f"--{RUNTIME}"]],
    "queue": [
        [*TPUS, "queued-resources", "create", "n", "--zone=z", SHAPE, f"--runtime-{RUNTIME}", *QUEUED],
        [*TPUS, "queued-resources", "describe", "n", "--zone=z", "--format=value(state.state)"],
    ],
}


@pytest.mark.parametrize("verb", VERBS)
def test_tpu_vm_verbs(verb):
    assert dry("tpu_vm.sh", verb, *TPU) == VERBS[verb]


def test_tpu_vm_all():
    create, pack, scp, unpack, install, run = dry("tpu_vm.sh", "all", *TPU, "--spot")
    assert create == [*VERBS["create"][0][:-1], "--spot", "--version=v2-alpha-tpuv5-lite"]
    assert pack[:2] == ["tar", "-czf"] and "--exclude=./.git" in pack and pack[-3:] == ["-C", str(LAUNCH.parent), "."]
    assert scp[4:6] == ["scp", pack[2]] and scp[6] == "n:jaxpost-launch.tgz" and scp[-1] == "--worker=all"
    assert (unpack, install) == (ssh(UNPACK), VERBS["install"][0])
    assert run[:-1] == ssh("")[:-1]
    inner = shlex.split(run[-1].removeprefix("--command="))
    assert inner == [*ON_HOST.split(), "start", "--tpu=v5e", *RESUMED, "--config.hosts.coordinator=auto"]


@pytest.mark.parametrize(
    ("topology", "flags", "version"),
    [
        ("v4:2x2x4", ["--type=v4", "--topology=2x2x4"], "tpu-ubuntu2204-base"),
        ("v5p:2x2x4", ["--accelerator-type=v5p-32"], "v2-alpha-tpuv5"),  # 16 chips of two cores
        ("v6e:4x8", ["--accelerator-type=v6e-32"], "v2-alpha-tpuv6e"),
    ],
)
def test_slices_of_other_generations(topology, flags, version):
    (create,) = dry("tpu_vm.sh", "create", "--name=n", "--zone=z", f"--topology={topology}")
    assert create[5:] == ["n", "--zone=z", *flags, f"--version={version}"]


def test_several_slices_are_queued_and_reached_by_node():
    create, *_ = dry("tpu_vm.sh", "queue", *TPU, "--slices=2", "--spot", "--project=p")
    assert {"--spot", "--node-count=2", "--node-prefix=n", "--project=p"} <= set(create)
    commands = dry("tpu_vm.sh", "install", *TPU, "--slices=2")
    assert commands == [ssh(f"{ON_HOST} install tpu", node=f"n-{index}") for index in range(2)]
    delete = ["gcloud", "compute", "tpus", "queued-resources", "delete", "n", "--zone=z", "--force", "--quiet"]
    assert dry("tpu_vm.sh", "delete", *TPU, "--queued") == [delete]


def test_one_host_needs_no_coordinator():
    (run,) = dry("tpu_vm.sh", "run", "--name=n", "--zone=z", "--topology=v5e:2x4")
    assert "hosts.coordinator" not in run[-1]


def test_ssh_run_counts_the_hosts():
    commands = dry("ssh.sh", "run", "--hosts=me@a,b")
    for index, (host, command) in enumerate(zip(["me@a", "b"], commands, strict=True)):
        assert command[:7] == ["ssh", "-n", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", host]
        hosts = ["--config.hosts.coordinator=a:8476", "--config.hosts.count=2", f"--config.hosts.index={index}"]
        assert shlex.split(command[7]) == [*ON_HOST.split(), "start", *RESUMED, *hosts]


def test_ssh_verbs():
    _, scp_a, scp_b, *rest = dry("ssh.sh", "copy", "--hosts=a,b")
    assert (scp_a[-1], scp_b[-1]) == ("a:jaxpost-launch.tgz", "b:jaxpost-launch.tgz")
    assert [line[-2:] for line in rest] == [["a", UNPACK], ["b", UNPACK]]
    assert [line[-1] for line in dry("ssh.sh", "install", "--hosts=a", "--extra=tpu")] == [f"{ON_HOST} install tpu"]
    assert [line[-2:] for line in dry("ssh.sh", "logs", "--hosts=a,b")] == [["a", f"{ON_HOST} log"]]
    assert [line[-2] for line in dry("ssh.sh", "stop", "--hosts=a,b")] == ["a", "b"]
    assert len(dry("ssh.sh", "all", "--hosts=a,b")) == 9  # pack; scp, unpack, install and run of each


def test_slurm_has_one_task_a_gpu():
    ((sbatch, *options),) = dry("slurm.sh", "--nodes=2", "--gpus=8", "--time=24:00:00")
    script = options.index(str(LAUNCH / "slurm.sbatch"))
    assert sbatch == "sbatch" and options[script + 1 :] == [*RESUMED, "--config.hosts.coordinator=auto"]
    wanted = {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=24:00:00", f"--chdir={LAUNCH.parent}"}
    assert wanted <= set(options[:script])
    ask = [line.split()[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line[:8] == "#SBATCH "]
    assert {"--requeue", "--signal=B:TERM@300", "--open-mode=append", "--gpu-bind=none"} <= set(ask)


def test_sky_verbs():
    cd, tpu = dry("sky.sh", "launch", "--name=n", "--topology=v5e:4x4", "--spot")
    assert cd == ["cd", str(LAUNCH.parent)] and tpu[-1] == "launch/sky.yaml"
    assert {"--use-spot", "--gpus=tpu-v5litepod-16", "EXTRA=tpu", "TPU=v5e"} <= set(tpu)
    _, gpu = dry("sky.sh", "launch", "--name=n", "--gpus=H100:8", "--nodes=2")
    assert {"--no-use-spot", "--gpus=H100:8", "--num-nodes=2", "EXTRA=cuda"} <= set(gpu)
    arguments = next(word for word in gpu if word.startswith("ARGUMENTS="))
    assert shlex.split(arguments.removeprefix("ARGUMENTS=")) == RESUMED
    assert dry("sky.sh", "logs", "--name=n") == [["sky", "jobs", "logs", "--name=n", "--no-follow"]]
    assert dry("sky.sh", "cancel", "--name=n") == [["sky", "jobs", "cancel", "--yes", "--name=n"]]


def test_gke_verbs_around_the_manifest():
    build, push = dry("gke.sh", "image", "--image=i:1")
    assert build == ["docker", "build", f"--file={LAUNCH}/gke/Dockerfile", "--tag=i:1", str(LAUNCH.parent)]
    assert push == ["docker", "push", "i:1"]
    assert dry("gke.sh", "delete", "--name=n") == [
        ["kubectl", "delete", "jobset", "n", "--wait=true", "--timeout=300s"]
    ]
    ((*command, tail),) = dry("gke.sh", "logs", "--name=n")
    assert command[:2] == ["kubectl", "logs"] and "jobset-name=n," in command[2] and tail == "--tail=200"
    more = ["--name=n", "--image=i:1", "--topology=v5p:2x2x4", "--cluster=c", "--zone=z", "--slices=2", "--spot"]
    (xpk,) = dry("gke.sh", "xpk", *more)
    wanted = {"--workload=n", "--cluster=c", "--tpu-type=v5p-32", "--num-slices=2", "--docker-image=i:1", "--spot"}
    assert {*wanted, "--max-restarts=100", "--zone=z"} <= set(xpk)
    inner = shlex.split(xpk[-1].removeprefix("--command=cd /jaxpost && "))
    assert inner == ["bash", "launch/host.sh", "run", "--tpu=v5p", *RESUMED, "--config.hosts.coordinator=auto"]


def await_file(path, seconds=20):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@pytest.fixture
def stubs(tmp_path):
    """PATH with a `gcloud` and an `ssh` that have a shell evaluate their command, as the far side does, and a python
    that writes its arguments, one a line, to the file `arguments`; a home with a copy of launch/."""
    folder = tmp_path / "bin"
    (tmp_path / "jaxpost-launch" / "src").mkdir(parents=True)
    (tmp_path / "jaxpost-launch" / "src" / "launch").symlink_to(LAUNCH)
    folder.mkdir()
    far = 'cd "$HOME" && exec sh -c "${@: -1}"'
    scripts = {
        "gcloud": 'last="${@: -1}"; set -- "${last#--command=}"; ' + far,
        "ssh": far,
        "python": f'printf "%s\\n" "$@" > {tmp_path}/writing && mv {tmp_path}/writing {tmp_path}/arguments',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("script", "arguments"), [("tpu_vm.sh", ["run", *TPU]), ("ssh.sh", ["run", "--hosts=somewhere", "--tpu=v6e"])]
)
def test_arguments_arrive_intact(stubs, script, arguments):
    done = launch(script, *arguments, "--", *JAXPOST, path=f"{stubs}/bin:/usr/bin:/bin", HOME=str(stubs))
    assert done.returncode == 0, done.stderr
    await_file(stubs / "arguments")
    said = (stubs / "arguments").read_text().splitlines()
    coordinator = ["--config.hosts.coordinator=auto"] if script == "tpu_vm.sh" else []
    assert said == ["-m", "jaxpost.main", *RESUMED, *coordinator]


@pytest.mark.parametrize(("ends_with", "code"), [(0, 143), (2, 2)])
def test_host_hands_sigterm_on_and_says_that_it_stopped(stubs, ends_with, code):
    (stubs / "bin" / "python").write_text(
        f"#!/usr/bin/env bash\ntrap 'sleep 0.2; exit {ends_with}' TERM\n"
        f"touch {stubs}/ready\nwhile :; do sleep 0.05; done\n"
    )
    env = {"PATH": f"{stubs}/bin:/usr/bin:/bin", "HOME": str(stubs)}
    with subprocess.Popen(["bash", LAUNCH / "host.sh", "run", *JAXPOST], env=env) as process:
        await_file(stubs / "ready")
        process.terminate()
        assert process.wait(20) == code


def test_slurm_requeues_what_was_stopped_and_is_still_running(stubs):
    for name, text in {
        "srun": "exit 143",
        "squeue": f"cat {stubs}/state",
        "scontrol": f'echo "$@" >> {stubs}/requeued',
    }.items():
        (stubs / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (stubs / "bin" / name).chmod(0o755)
    for state, requeued in [("COMPLETING", False), ("RUNNING", True)]:
        (stubs / "state").write_text(state)
        done = launch("slurm.sbatch", *JAXPOST, path=f"{stubs}/bin:/usr/bin:/bin", SLURM_JOB_ID="7")
        assert done.returncode == 143
        assert (stubs / "requeued").exists() == requeued
    assert (stubs / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tpu_vm.sh fly", "fly: unknown verb; there are create"),
        ("tpu_vm.sh create --name=n --zone=z", "--topology: missing"),
        ("tpu_vm.sh create --zone=z --topology=v5e:4x4", "--name: missing"),
        ("tpu_vm.sh create --name=n --zone=z --topology=v5e:2x2x4", "give v5e:ROWSxCOLUMNS"),
        ("tpu_vm.sh create --name=n --zone=z --topology=v5e:3x5", "15 chips; a host has 4"),
        ("tpu_vm.sh create --name=n --zone=z --topology=v5e:4x4 --slices=0", "--slices=0: not a whole number"),
        ("tpu_vm.sh create --name=n --zone=z --topology=v5e:4x4 --slices=2", "several slices come by queue"),
        ("tpu_vm.sh run --name=n --zone=z --topology=v5e:4x4 -- --config=a", "--config.run.dir: missing"),
        ("tpu_vm.sh run --name=n --zone=z --topology=v5e:4x4 -- --config.run.dir=a", "--config: missing"),
        ("tpu_vm.sh run --name=n --zone=z --topology=v5e:4x4 -- steps=3", "steps=3: no argument of jaxpost"),
        ("tpu_vm.sh delete --name=n --zone=z -- --config=a", "delete takes no config"),
        ("ssh.sh run -- --config=a --config.run.dir=b", "--hosts: missing"),
        ("ssh.sh install --hosts=a --extra=rocm", "--extra=rocm: unknown argument"),
        ("slurm.sh --nodes=2 -- --config=a", "--gpus: missing"),
        ("sky.sh launch --name=n --dry-run -- --config=a --config.run.dir=b", "--topology, --gpus: give one"),
        ("gke.sh apply --name=A --image=i --topology=v5e:4x4", "--name=A: give at most 40"),
        ("gke.sh xpk --name=a --image=i --topology=v5e:4x4", "--cluster: missing"),
        ("host.sh install rocm", "install: give the extra"),
        ("host.sh run --tpu=v9", "--tpu=v9: unknown generation; there are v4, v5e, v5p, v6e"),
    ],
)
def test_bad_arguments_are_one_line(line, said):
    script, *arguments = line.split()
    done = launch(script, *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_missing_client_is_named(tmp_path):
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    bash = subprocess.run(
        ["/bin/bash", LAUNCH / "tpu_vm.sh", "delete", *TPU], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert bash.returncode == 2 and bash.stderr == "error: gcloud: not found; install the Google Cloud CLI\n"


@pytest.mark.parametrize("script", ["tpu_vm.sh", "ssh.sh", "slurm.sh", "sky.sh", "gke.sh", "host.sh"])
def test_help(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert script in done.stdout and "--dry-run" in done.stdout and "set -euo" not in done.stdout
