"""Folders of runs (config.json, metrics.jsonl, checkpoints/, export/; one run each, never written over) and models."""

import dataclasses
import itertools
import json
import logging
import time

from etils import epath

from jaxpost import config as configs
from jaxpost import embedded
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.keys import HostsConfig, MeshConfig
from jaxpost.models import hf
from jaxpost.train import hosts

log = logging.getLogger("jaxpost")

SHARED_SECONDS = 20  # until a file of one host is seen by the others, at most: network file systems cache

# What may differ when a run goes on: how long it lasts, where the folder now lies, on what it runs, and which server
# draws.
MAY_GROW = ("run.steps", "run.epochs")
SERVER = ("url", "served_model", "api_key_env", "reload", "concurrency", "timeout_s", "retries")
MAY_DIFFER = (
    *("run.dir", "run.resume", "data.tokenize", "data.workers", "data.cache_dir", *MAY_GROW),
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
    *(f"hosts.{field.name}" for field in dataclasses.fields(HostsConfig)),
    *(f"sampling.{name}" for name in SERVER),
)


def choose_folder(config) -> tuple[epath.Path, bool]:
    """(run folder, whether it holds a run to go on with). Writes nothing that stays.

    Without `run.dir` a fresh one is taken: runs/STAGE-1, runs/STAGE-2, ... Of several hosts the first one chooses.
    Raises ConfigError when the folder holds another run, or this one and `run.resume` is False, or when a host does not
    see what another writes there.
    """
    folder, resume = hosts.told(lambda: _chosen(config))
    folder = epath.Path(folder)
    if hosts.count() > 1:
        _check_shared(folder)
    return folder, resume


def _check_shared(folder: epath.Path) -> None:
    """Raises ConfigError, on every host, for the first host that does not find a file of the first one's there."""
    proof = folder / ".hosts"
    if hosts.first():
        folder.mkdir(parents=True, exist_ok=True)
        proof.write_text("a run of several hosts begins here\n")
    hosts.wait()
    until = time.monotonic() + SHARED_SECONDS
    while not (there := proof.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    seen = hosts.gathered(there)
    if hosts.first():
        proof.unlink()
    if not all(seen):
        host = seen.index(False)
        raise ConfigError(
            f"run.dir: {folder} on host {host} is not the one on host 0; it must be on storage of all hosts"
        )


def _chosen(config) -> tuple[str, bool]:
    if config.run.dir is None:
        if config.run.resume:
            raise ConfigError("run.dir: missing; run.resume=True needs the folder of the run to go on with")
        folders = (epath.Path(f"runs/{config.stage}-{n}") for n in itertools.count(1))
        return str(next(folder for folder in folders if not folder.exists())), False
    folder = epath.Path(config.run.dir)
    if not is_run(folder):
        if config.run.resume:
            log.warning("run.resume: no run in %s yet; starting afresh", folder)
        return str(folder), False
    if not config.run.resume:
        raise ConfigError(f"run.dir: {folder} already holds a run; set run.resume=True to go on, or another run.dir")
    before = read_config(folder)
    for key, (old, new) in configs.differences(before, config).items():
        if key not in MAY_DIFFER:
            raise ConfigError(
                f"{key}: {new!r} differs from the {old!r} of the run in {folder}; only more steps may be asked for"
            )
        if key in MAY_GROW and old is not None and new is not None and new < old:
            raise ConfigError(f"{key}: {new} is less than the {old} of the run in {folder}; only more may be asked for")
    return str(folder), True


def model_folder(path: str) -> epath.Path:
    """Where a model lies that is named as in `model.path`: of the embedded world, of the hub, or a folder.

    Raises ConfigError, CheckpointError.
    """
    return epath.Path(hf.resolve(embedded.resolve(path)))


def is_run(folder) -> bool:
    """Whether the folder holds a run (and not a model, which has a config.json of another kind)."""
    path = epath.Path(folder) / "config.json"
    return path.exists() and '"stage"' in path.read_text()


def read_config(folder):
    """The resolved config of a run folder. Raises CheckpointError when it is broken."""
    path = epath.Path(folder) / "config.json"
    try:
        return configs.resolve(json.loads(path.read_text()))
    except (json.JSONDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def write_config(folder: epath.Path, config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", configs.to_json(config))


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes beside and renames: a reader sees the old text or the new one, never half of it. The first host writes."""
    if not hosts.first():
        return
    beside = path.parent / (path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)
