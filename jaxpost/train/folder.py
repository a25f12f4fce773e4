"""Folders of runs (config.json, metrics.jsonl, checkpoints/, export/; one run each, never written over) and models."""

import itertools
import json
import logging

from etils import epath

from jaxpost import config as configs
from jaxpost import embedded
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models import hf

log = logging.getLogger("jaxpost")

# What may differ when a run goes on: how long it lasts, where the folder now lies, and which server draws.
MAY_GROW = ("run.steps", "run.epochs")
SERVER = ("url", "served_model", "api_key_env", "reload", "concurrency", "timeout_s", "retries")
MAY_DIFFER = (
    *("run.dir", "run.resume", "data.tokenize", "data.workers", "data.cache_dir", *MAY_GROW),
    *(f"sampling.{name}" for name in SERVER),
)


def choose_folder(config) -> tuple[epath.Path, bool]:
    """(run folder, whether it holds a run to go on with). Writes nothing.

    Without `run.dir` a fresh one is taken: runs/STAGE-1, runs/STAGE-2, ...
    Raises ConfigError when the folder holds another run, or this one and `run.resume` is False.
    """
    if config.run.dir is None:
        if config.run.resume:
            raise ConfigError("run.dir: missing; run.resume=True needs the folder of the run to go on with")
        folders = (epath.Path(f"runs/{config.stage}-{n}") for n in itertools.count(1))
        return next(folder for folder in folders if not folder.exists()), False
    folder = epath.Path(config.run.dir)
    if not is_run(folder):
        if config.run.resume:
            log.warning("run.resume: no run in %s yet; starting afresh", folder)
        return folder, False
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
    return folder, True


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
    """Writes beside and renames: a reader sees the old text or the new one, never half of it."""
    beside = path.parent / (path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)
