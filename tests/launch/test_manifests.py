"""The manifests against schemas, what they say for several slices, shellcheck, and libtpu's own word on the flags."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

from tests.launch.schemas import JOBSET, SKY
from tests.launch.test_dry_runs import JAXPOST, LAUNCH, RESUMED, launch


def manifest(*arguments):
    given = ["--name=n", "--image=registry/image:1", *arguments, "--dry-run", "--", *JAXPOST]
    done = launch("gke.sh", "apply", *given)
    assert done.returncode == 0, done.stderr
    command, *lines, end = done.stdout.splitlines()
    assert (command, end) == ("kubectl apply --filename=- <<'MANIFEST'", "MANIFEST")
    text = "\n".join(lines)
    assert "${" not in text
    return yaml.safe_load(text)


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips"),
    [
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v6e:4x8", "tpu-v6e-slice", 8, 4),
        ("v5p:2x2x4", "tpu-v5p-slice", 4, 4),
        ("v4:2x2x1", "tpu-v4-podslice", 1, 4),
    ],
)
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("spot", [False, True])
def test_jobset(topology, accelerator, hosts, chips, slices, spot):
    found = manifest(f"--topology={topology}", f"--slices={slices}", "--restarts=7", *["--spot"] * spot)
    jsonschema.validate(found, JOBSET)
    assert found["metadata"]["name"] == "n" and found["spec"]["failurePolicy"]["maxRestarts"] == 7
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (slices, hosts, hosts)
    pod = job["template"]["spec"]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }
    assert pod["nodeSelector"] == selector | ({"cloud.google.com/gke-spot": "true"} if spot else {})
    assert len(pod["tolerations"]) == 1 + spot
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    several = ["--config.hosts.coordinator=auto"] if hosts * slices > 1 else []
    said = [word.replace("$$(", "$(") for word in container["args"]]  # as Kubernetes reads it
    assert said == ["launch/host.sh", "run", f"--tpu={topology[:3].strip(':')}", *RESUMED, *several]
    assert "$$(x)" in " ".join(container["args"])


def test_a_wrong_field_is_seen():
    found = manifest("--topology=v5e:4x4")
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["paralellism"] = 4
    with pytest.raises(jsonschema.ValidationError, match="paralellism"):
        jsonschema.validate(found, JOBSET)


@pytest.mark.parametrize(
    ("extra", "nodes", "before", "after"),
    [
        ("tpu", 4, ["--tpu=v5e"], []),
        ("cuda", 1, [], []),
        ("cuda", 2, [], ["coordinator=10.0.0.1:8476", "count=2", "index=1"]),
    ],
)
def test_sky(tmp_path, extra, nodes, before, after):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    jsonschema.validate(task, SKY)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "host.sh").write_text('printf "%s\\n" "$@"')
    env = {
        "PATH": "/usr/bin:/bin",
        "EXTRA": extra,
        "TPU": "v5e" if extra == "tpu" else "",
        "ARGUMENTS": shlex.join(RESUMED),
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["run", *before, *RESUMED, *[f"--config.hosts.{word}" for word in after]]


def test_shellcheck(tmp_path):
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra test)")
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    (tmp_path / "sky.sh").write_text(f"#!/usr/bin/env bash\n{task['setup']}\n{task['run']}")
    scripts = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), tmp_path / "sky.sh"])
    done = subprocess.run([shellcheck, *scripts], cwd=LAUNCH, capture_output=True, text=True, timeout=60)
    assert len(scripts) == 10 and done.returncode == 0, done.stdout


COMPILE = """
import sys, jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=SingleDeviceSharding(device))
jax.jit(lambda x: x + 1).lower(x).compile()
"""


@pytest.mark.parametrize(
    ("topology", "more", "code"),
    [
        ("v4:2x2x1", "", 0),
        ("v5e:2x2", "", 0),
        ("v5p:2x2x1", "", 0),
        ("v6e:2x2", "", 0),
        ("v6e:2x2", "--xla_no_such_flag=true", 1),
    ],
)
def test_libtpu_knows_the_flags(topology, more, code):
    pytest.importorskip("libtpu")
    source = f"source common.sh; source libtpu_flags.sh; libtpu_flags {topology.split(':')[0]}"
    flags = subprocess.run(
        ["bash", "-c", source], cwd=LAUNCH, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert bool(flags) == (not topology.startswith("v5e"))
    env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    env["LIBTPU_INIT_ARGS"] = f"{flags} {more}"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topology], env=env, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == bool(code), done.stderr
    assert ("Unknown command line flag 'xla_no_such_flag'" in done.stdout + done.stderr) == bool(code)
