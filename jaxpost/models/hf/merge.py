"""Several checkpoints in Hugging Face layout made into one, tensor by tensor: no model is in memory as a whole."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from etils import epath
from safetensors import safe_open

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models.config import ModelConfig
from jaxpost.models.hf.config import FAMILIES, read_config
from jaxpost.models.hf.keys import read_json
from jaxpost.models.hf.load import INDEX, check_tensors, open_tensors, weight_files
from jaxpost.models.hf.names import Piece, pieces, sizes_of
from jaxpost.models.hf.save import check_target, json_bytes, place_folder
from jaxpost.models.merging import METHODS, Recipe, merge_tensors

MAY_DIFFER = ("bos_id", "eos_ids", "pad_id", "max_positions")  # say nothing of what the weights mean
COPIED = (".json", ".json.gz", ".jinja", ".model", ".txt")
RECORD = "merge.json"


def merge(
    to: str,
    models: Sequence[str],
    recipe: Recipe,
    *,
    base: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = 1024**3,
    track: Callable[[Sequence[Piece]], Iterable[Piece]] = iter,
) -> None:
    """Writes the model that the recipe makes of others; config and tokenizer files are the base's, else the first's.

    In memory at a time: some rows of one tensor of each model, and one output file of `shard_bytes`.

    Args:
      to: the new folder, put in place when it is whole. It holds merge.json too, which says what it was made of.
      models: folders of one architecture, one a weight of the recipe.
      base: what they were trained from, for a method with task vectors.
      dtype: of the tensors written; None: each as in the base, or the first model.
      track: goes through the tensors, to show how far it is.

    Raises:
      ConfigError: a base is missing, or not needed.
      CheckpointError: a model is broken, or is not of the same architecture as the first; `to` holds something else.
    """
    if METHODS[recipe.method].needs_base != (base is not None):
        wanted = f"missing; {recipe.method} adds up changes of it" if base is None else f"{recipe.method} needs none"
        raise ConfigError(f"base: {wanted}")
    target, lead = epath.Path(to), epath.Path(models[0] if base is None else base)
    check_target(target, "config.json")
    folders = [epath.Path(path) for path in ([] if base is None else [base]) + list(models)]
    config = read_config(lead)
    sizes, wanted = sizes_of(config), list(pieces(FAMILIES[config.family].weights(config), config))
    for folder in folders:
        check_same(config, lead, read_config(folder), folder)
    with contextlib.ExitStack() as stack:
        places = [_places(folder, wanted, config, stack) for folder in folders]

        def merged() -> Iterator[tuple[str, np.ndarray]]:
            for piece in track(wanted):
                tensors = [_Tensor(place[piece.name], piece.name) for place in places]
                first = None if base is None else tensors.pop(0)
                shape = piece.weight.shape(sizes)
                yield piece.name, merge_tensors(recipe, piece.name, tensors, first, shape=shape, dtype=dtype)

        files = _files_beside(lead, dtype) | {RECORD: _record(models, recipe, base, dtype)}
        place_folder(target, merged(), files, shard_bytes=shard_bytes)


def check_same(config: ModelConfig, lead: epath.Path, other: ModelConfig, folder: epath.Path) -> None:
    """Raises CheckpointError, naming the first difference, where the weights of two models do not mean the same."""
    for field in dataclasses.fields(config):
        wanted, found = getattr(config, field.name), getattr(other, field.name)
        if found != wanted and field.name not in MAY_DIFFER:
            raise CheckpointError(
                f"{folder / 'config.json'}: {field.name} is {found}, but {wanted} in {lead}; "
                "only models of one architecture can be merged"
            )


def _places(
    folder: epath.Path, wanted: list[Piece], config: ModelConfig, stack: contextlib.ExitStack
) -> dict[str, str]:
    """{tensor name: local path of the file that holds it}, all checked."""
    files = weight_files(folder, stack)
    with contextlib.ExitStack() as opened:
        tensors = open_tensors(folder, files, opened)
        check_tensors(tensors, wanted, sizes_of(config), folder, config.tied)
        return {name: files[file] for name, (file, _) in tensors.items()}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, of which rows are read as they are asked for.

    The file is opened each time: it is mapped, and pages once read would add up to the whole model in memory.
    """

    path: str
    name: str

    def __getitem__(self, rows: slice) -> np.ndarray:
        with safe_open(self.path, framework="np") as file:
            return file.get_slice(self.name)[rows]


def _files_beside(folder: epath.Path, dtype: str | None) -> dict[str, bytes]:
    """Config, tokenizer and template files of a model; the config names the weights' new type, if there is one."""
    paths = [path for path in folder.iterdir() if path.name.endswith(COPIED) and path.name != INDEX]
    paths += folder.glob("additional_chat_templates/*.jinja")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}
    if dtype is not None:
        values = read_json(folder / "config.json")
        key = "dtype" if "dtype" in values else "torch_dtype"  # as newer transformers spell it
        files["config.json"] = json_bytes(values | {key: dtype})
    return files


def _record(models: Sequence[str], recipe: Recipe, base: str | None, dtype: str | None) -> bytes:
    values = dataclasses.asdict(recipe) | {"models": [str(path) for path in models]}
    return json_bytes(values | {"base": base and str(base), "dtype": dtype})
