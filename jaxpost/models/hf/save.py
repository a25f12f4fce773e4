"""Parameters back to a Hugging Face folder that `transformers` loads."""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxpost.errors import CheckpointError
from jaxpost.models.config import ModelConfig
from jaxpost.models.hf.config import FAMILIES, config_files
from jaxpost.models.hf.load import INDEX, SINGLE
from jaxpost.models.hf.names import Weight, pieces, to_tensor
from jaxpost.models.policy import Policy


def export(
    path: str,
    params: Any,
    policy: Policy,
    files: dict[str, bytes],
    *,
    dtype: str | None = None,
    shard_bytes: int = 2 * 1024**3,
) -> None:
    """Writes weights (safetensors of at most `shard_bytes`, with an index if there are several), config and `files`.

    Everything is written to a folder beside `path` that takes its place at the end, so an older export there is whole
    until the new one is. Tensors leave the devices one by one. With several hosts all must call; the first writes.

    Args:
      files: further files by name: the tokenizer's.
      dtype: of the tensors in the files; None: that of the parameters.

    Raises:
      CheckpointError: `path` is a file, or a folder that is not a model (nothing in it is touched), or writing failed.
    """
    dtype = str(np.dtype(dtype or params["embed"]["weight"].dtype))
    weights = FAMILIES[policy.config.family].weights(policy.config)
    own = {name: json_bytes(values) for name, values in config_files(policy.config, dtype).items()}
    tensors = tensors_of(params, weights, policy.config, dtype)
    write_folder(path, tensors, own | files, marker="config.json", shard_bytes=shard_bytes)


def json_bytes(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def tensors_of(params: Any, weights: tuple[Weight, ...], config: ModelConfig, dtype: str) -> Iterator:
    """(name, array) of every tensor that `weights` name, taken off the devices one by one."""
    for piece in pieces(weights, config):
        value = params
        for key in piece.path:
            value = value[key]
        value = value[piece.index] if piece.index else value
        if getattr(value, "is_fully_addressable", True):
            value = np.asarray(value)
        else:
            value = multihost_utils.process_allgather(value, tiled=True)
        yield piece.name, to_tensor(piece.weight, value).astype(dtype)


def write_folder(
    path: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    files: dict[str, bytes],
    *,
    marker: str,
    single: str = SINGLE,
    shard_bytes: int = 2 * 1024**3,
    metadata: dict[str, str] | None = None,
) -> None:
    """Tensors (in the order they come, never all in memory) and files, as a folder that is there whole or not at all.

    marker: the file that tells such a folder; one that has it is replaced. single: name of the weights if one file is
    enough. metadata: of these, besides their format. With several hosts all must call; the first writes. Raises
    CheckpointError as `export`.
    """
    check_target(epath.Path(path), marker)
    if jax.process_index() != 0:
        for _ in tensors:  # takes part in gathering them
            pass
        return
    place_folder(epath.Path(path), tensors, files, single=single, shard_bytes=shard_bytes, metadata=metadata)


def check_target(target: epath.Path, marker: str) -> None:
    """Raises CheckpointError where something stands that is no folder with the file `marker` in it."""
    if target.exists() and not (target.is_dir() and ((target / marker).exists() or not any(target.iterdir()))):
        raise CheckpointError(f"{target}: exists and is not an exported model; choose another folder")


def place_folder(
    target: epath.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    files: dict[str, bytes],
    *,
    single: str = SINGLE,
    shard_bytes: int,
    metadata: dict[str, str] | None = None,
) -> None:
    """`write_folder` by one process, which asks jax for nothing; in place of whatever stands there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        _write_weights(folder, tensors, single, shard_bytes, metadata or {})
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        _replace(folder, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: could not be written ({error}); what was there before is untouched") from None
    finally:
        if folder.exists():
            folder.rmtree()


def _write_weights(folder, tensors, single, shard_bytes, metadata):
    shards, held, size = [], {}, 0

    def flush():
        name = f"part-{len(shards)}.safetensors"
        _save(held, folder / name, metadata)
        shards.append((name, list(held)))
        held.clear()

    total = 0
    for name, value in tensors:
        if held and size + value.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = value
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / shards[0][0]).rename(folder / single)
        return
    weight_map = {}
    for i, (part, names) in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / part).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_bytes(json_bytes(index))


def _save(tensors, path, metadata):
    """safetensors writes local files only; a remote one is copied from there."""
    with contextlib.ExitStack() as stack:
        remote = "://" in str(path)
        local = f"{stack.enter_context(tempfile.TemporaryDirectory())}/{path.name}" if remote else str(path)
        save_file(tensors, local, metadata={"format": "pt", **metadata})
        os.chmod(local, os.stat(os.path.dirname(local)).st_mode & 0o666)  # safetensors lets the owner alone read it
        if remote:
            epath.Path(local).copy(path)


def _replace(folder, target):
    if not target.exists():
        folder.rename(target)
        return
    old = target.parent / f"{folder.name}.old"
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    old.rmtree()
