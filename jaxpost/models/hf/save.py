"""Parameters back to a Hugging Face folder that `transformers` loads."""

import contextlib
import json
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxpost.errors import CheckpointError
from jaxpost.models.hf.config import FAMILIES, config_files
from jaxpost.models.hf.load import INDEX, SINGLE
from jaxpost.models.hf.names import pieces, to_tensor
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
    target = epath.Path(path)
    if target.exists() and not (target.is_dir() and ((target / "config.json").exists() or not any(target.iterdir()))):
        raise CheckpointError(f"{target}: exists and is not an exported model; choose another folder")
    dtype = str(np.dtype(dtype or params["embed"]["weight"].dtype))
    tensors = _tensors(params, policy, dtype)
    if jax.process_index() != 0:
        for _ in tensors:  # takes part in gathering them
            pass
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        _write_weights(folder, tensors, shard_bytes)
        for name, values in config_files(policy.config, dtype).items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        _replace(folder, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: could not be written ({error}); what was there before is untouched") from None
    finally:
        if folder.exists():
            folder.rmtree()


def _tensors(params, policy, dtype) -> Iterator[tuple[str, np.ndarray]]:
    for piece in pieces(FAMILIES[policy.config.family].weights(policy.config), policy.config):
        value = params
        for key in piece.path:
            value = value[key]
        value = value[piece.index] if piece.index else value
        if getattr(value, "is_fully_addressable", True):
            value = np.asarray(value)
        else:
            value = multihost_utils.process_allgather(value, tiled=True)
        yield piece.name, to_tensor(piece.weight, value).astype(dtype)


def _write_weights(folder, tensors, shard_bytes):
    shards, held, size = [], {}, 0

    def flush():
        name = f"part-{len(shards)}.safetensors"
        _save(held, folder / name)
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
        (folder / shards[0][0]).rename(folder / SINGLE)
        return
    weight_map = {}
    for i, (part, names) in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / part).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors, path):
    """safetensors writes local files only; a remote one is copied from there."""
    with contextlib.ExitStack() as stack:
        remote = "://" in str(path)
        local = f"{stack.enter_context(tempfile.TemporaryDirectory())}/{path.name}" if remote else str(path)
        save_file(tensors, local, metadata={"format": "pt"})
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
