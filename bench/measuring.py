"""One process a measurement, one after another: what the benchmarks beside peers have in common."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared" / "data"
TOKENIZER = SHARED / "tokenizers" / "mistral" / "tokenizer.model.v1"  # 32,000 pieces, the vocabulary of the shape


@dataclasses.dataclass(frozen=True)
class Run:
    """One process: who, and with which options of its script."""

    peer: str  # jaxpost, tunix or trl: the environment and the script peers/PEER_TASK.py
    label: str
    options: tuple[str, ...] = ()


def measure(task: str, work: dict, runs: list[Run], envs: pathlib.Path) -> list[dict]:
    """What each run reports of `work`, with its peer and label. envs: where bench/setup.sh made the environments."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "workload.json")
        path.write_text(json.dumps(work))
        return [{"peer": run.peer, "label": run.label, **execute(task, run, path, envs)} for run in runs]


def execute(task: str, run: Run, path: pathlib.Path, envs: pathlib.Path) -> dict:
    """What the peer's script printed as its last line, or {"error": why not}."""
    python = pathlib.Path(sys.executable) if run.peer == "jaxpost" else envs / run.peer / "bin" / "python"
    if not python.exists():
        return {"error": f"no {python}: run bench/setup.sh {envs}"}
    command = [str(python), str(HERE / "peers" / f"{run.peer}_{task}.py"), f"--workload={path}", *run.options]
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")] if run.peer == "jaxpost" else []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A table; short rows are filled up."""
    lines = [f"\n{title}", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" + " |" * (len(head) - len(row)) for row in rows])
