"""Safetensors into sharded parameters, slice by slice: no device and no host holds a whole model."""

import collections
import contextlib
import functools
import hashlib
import itertools
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxpost.errors import CheckpointError
from jaxpost.models.hf.config import FAMILIES
from jaxpost.models.hf.keys import read_json
from jaxpost.models.hf.names import Piece, from_slice, pieces, sizes_of
from jaxpost.models.policy import Policy
from jaxpost.sharding import with_dtype

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
IGNORED = ("rotary_emb.inv_freq",)  # buffers that old files carry


def load_params(
    path: str,
    policy: Policy,
    shardings: Any = None,
    dtype: str = "float32",
    scores: jax.Array | None = None,
    *,
    keep: Any = None,
) -> Any:
    """The parameters of `policy` from the safetensors in a Hugging Face folder (one file, or several with an index).

    Args:
      path: the folder, local or gs://.
      shardings: a jax sharding per parameter (sharding.named_shardings); None: all on the first device.
      dtype: of the parameters, whatever the files hold (bf16, f16, f32).
      scores: [R, D], the scalar heads of a policy that has them, where the files are a language model's. None: the
        files hold them.
      keep: (path, array) -> {path: array}, what is kept of each parameter as soon as it is read (models.quantize).

    Raises:
      CheckpointError: a missing folder, file or tensor, a truncated file, a wrong shape, a tensor without a place.
    """
    abstract = policy.abstract()
    if shardings is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
    typed = with_dtype(abstract, dtype)
    weights = FAMILIES[policy.config.family].weights(policy.config)
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(epath.Path(path), weight_files(epath.Path(path), stack), stack)
        read = functools.partial(read_parameters, epath.Path(path), tensors, keep=keep)
        if scores is None:
            return read(weights, policy.config, sizes_of(policy.config), typed, shardings)
        weights = tuple(weight for weight in weights if weight.path != "score/weight")
        trunk, placed = ({k: v for k, v in tree.items() if k != "score"} for tree in (typed, shardings))
        head = {"weight": jax.device_put(scores.astype(dtype), shardings["score"]["weight"])}
        return {**read(weights, policy.config, sizes_of(policy.config), trunk, placed), "score": head}


def read_parameters(folder: epath.Path, tensors, weights, config, sizes, abstract, shardings, keep=None) -> Any:
    """A tree like `abstract`, each leaf put together from the open `tensors` that `weights` names."""
    by_path = collections.defaultdict(list)
    for piece in pieces(weights, config):
        by_path[piece.path].append(piece)
    headless = config.tied or config.num_scores > 0  # the files may yet hold a head of words
    check_tensors(tensors, itertools.chain.from_iterable(by_path.values()), sizes, folder, headless)

    placed, found = flatten_dict(shardings), {}
    for path, leaf in flatten_dict(abstract).items():
        value = _parameter(by_path[path], tensors, leaf.shape, placed[path], leaf.dtype, sizes)
        found |= keep(path, value) if keep else {path: value}
    return unflatten_dict(found)


def _parameter(own: list[Piece], tensors, shape, sharding, dtype, sizes):
    @functools.cache  # jax asks once a device, copies included
    def shard(bounds):
        bounds = [slice(*bound) for bound in bounds]
        stacked = len(own[0].index)  # leading dimensions, of which every tensor holds one entry
        if not stacked:
            return value(own[0], bounds)
        out = np.empty([bound.stop - bound.start for bound in bounds], dtype)
        for piece in own:
            if all(bound.start <= i < bound.stop for i, bound in zip(piece.index, bounds, strict=False)):
                at = tuple(i - bound.start for i, bound in zip(piece.index, bounds, strict=False))
                out[at] = value(piece, bounds[stacked:])
        return out

    def value(piece, bounds):
        tensor = tensors[piece.name][1].get_slice(piece.name)
        return from_slice(piece.weight, tensor, bounds, sizes).astype(dtype)

    def at(index):
        return shard(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, sharding, at)


def weight_files(folder: epath.Path, stack: contextlib.ExitStack) -> dict[str, str]:
    """{name of a file with weights: local path} of a model; remote files are fetched, until the stack is closed."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; wanted a model in Hugging Face layout")
    if (folder / INDEX).exists():
        placed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict):
            raise CheckpointError(f"{folder / INDEX}: weight_map: is missing or not an object")
        names = sorted(set(placed.values()))
    elif (folder / SINGLE).exists():
        names = [SINGLE]
    else:
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX} (other weight formats are not read)")
    return {name: _local(folder / name, stack) for name in names}


def open_tensors(folder: epath.Path, files: dict[str, str], stack: contextlib.ExitStack) -> dict[str, tuple[str, Any]]:
    """{tensor name: (file name, open file)} of a folder's `weight_files`."""
    tensors = {}
    for name, local in files.items():
        file = _open(folder / name, local, stack)
        tensors |= {tensor: (name, file) for tensor in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def open_file(path: epath.Path, stack: contextlib.ExitStack):
    return _open(path, _local(path, stack), stack)


def _local(path: epath.Path, stack: contextlib.ExitStack) -> str:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file, but the files beside it call for it")
    if "://" not in str(path):
        return str(path)
    # safetensors maps files into memory: remote ones are fetched first
    local = f"{stack.enter_context(tempfile.TemporaryDirectory())}/{path.name}"
    path.copy(local)
    return local


def _open(path: epath.Path, local: str, stack: contextlib.ExitStack):
    try:
        return stack.enter_context(safe_open(local, framework="np"))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None


def check_tensors(tensors, wanted: Iterable[Piece], sizes, folder: epath.Path, tied: bool) -> None:
    """Raises CheckpointError where the open `tensors` are not those of the pieces, or not of their shapes."""
    expected = {piece.name: piece.weight.shape(sizes) for piece in wanted}
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{folder}: tensor {name} of shape {list(shape)} is missing")
        file, handle = tensors[name]
        found = handle.get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise CheckpointError(
                f"{folder / file}: tensor {name} has shape {found.get_shape()}, config.json implies {list(shape)}"
            )
        if found.get_dtype() not in FLOATS:
            raise CheckpointError(
                f"{folder / file}: tensor {name} has type {found.get_dtype()}, not {', '.join(FLOATS)}"
            )
    for name in tensors.keys() - expected.keys():
        if not name.endswith(IGNORED) and not (tied and name == "lm_head.weight"):
            raise CheckpointError(f"{folder / tensors[name][0]}: tensor {name} has no place in this model")


def fingerprint(path: str) -> str:
    """Of a checkpoint's weights, whatever its files and types: sha256 of the beginnings of all tensors in bf16."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(epath.Path(path), weight_files(epath.Path(path), stack), stack)
        for name, (_, file) in sorted(tensors.items()):
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            first = np.asarray(tensor[(*(slice(0, 1) for _ in shape[:-1]), slice(0, 16))])
            digest.update(f"{name}{shape}".encode() + first.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()
