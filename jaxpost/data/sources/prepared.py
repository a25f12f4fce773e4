"""Data sets that another library has prepared: TensorFlow Datasets (without TensorFlow) and Hugging Face datasets."""

import re
from collections.abc import Sequence

from etils import epath

from jaxpost.data.sources import files
from jaxpost.data.sources.base import Blocks, require
from jaxpost.errors import DataError

PART = r"[A-Za-z_]\w*(?:\[[^\]]*\])?"  # of a split: train, test[:10%]
# What the two libraries raise for a name, split, file format or network that is not there.
FAILURES = (ValueError, OSError, RuntimeError, ImportError, AssertionError)


def open_tfds(name: str, cache=None, path: str | None = None) -> Blocks:
    """`NAME`, `NAME:SPLIT` (with config and version as TFDS writes them), or a folder in place of the name.

    The split is `train` unless given; slices such as `train[:10%]` are splits too. The files must be ArrayRecord or
    Parquet. path: what the origins say, if not `tfds:NAME`.
    """
    path = path or f"tfds:{name}"
    tfds = require("tensorflow_datasets", "tfds", f"{path}: reading TensorFlow Datasets")
    name, split = _split_of(name)
    try:
        builder = tfds.builder_from_directory(name) if epath.Path(name).is_dir() else tfds.builder(name)
        # `data_source` downloads and prepares, and wants ArrayRecord even where Parquet is there already.
        ready = builder.is_prepared()
        records = builder.as_data_source(split=split) if ready else tfds.data_source(name, split=split)
    except FAILURES as error:
        raise DataError(f"{path}: TFDS cannot open it ({_first_line(error)})") from None
    info = records.dataset_info
    parts = [files.sha256(files.local(file, cache), cache) for file in info.splits[split].filepaths]
    lists = {key for key, feature in info.features.items() if _is_list_of_dicts(feature, tfds)}

    def read(start: int, stop: int) -> list[dict]:
        return [_with_lists(records[index], lists) for index in range(start, stop)]

    return Blocks(path, files.combined(split, *parts), len(records), read)


def open_hf(name: str, cache=None) -> Blocks:
    """`NAME` or `NAME:SPLIT` of a data set on the hub, or of a folder that the library can load."""
    path = f"hf:{name}"
    library = require("datasets", "hf", f"{path}: reading Hugging Face datasets")
    name, split = _split_of(name)
    try:
        return _hf(path, library.load_dataset(name, split=split, keep_in_memory=False), split, cache)
    except FAILURES as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: the library `datasets` cannot load it ({_first_line(error)})") from None


def open_saved(path: str, cache=None) -> Blocks:
    """A folder that `save_to_disk` of a Hugging Face dataset has written."""
    library = require("datasets", "hf", f"{path}: reading a saved Hugging Face dataset")
    try:
        return _hf(path, library.load_from_disk(path, keep_in_memory=False), "", cache)
    except FAILURES as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: the library `datasets` cannot load it ({_first_line(error)})") from None


def _hf(path: str, dataset, split: str, cache) -> Blocks:
    parts = [files.sha256(files.local(file["filename"], cache), cache) for file in dataset.cache_files]

    def read(start: int, stop: int) -> list[dict]:
        columns = dataset[start:stop]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    return Blocks(path, files.combined(split, *parts), len(dataset), read)


def _split_of(name: str) -> tuple[str, str]:
    """`name:split` apart, where there is a split: a version (name:1.0.0) and what belongs to a path are none."""
    found = re.fullmatch(rf"(.+?):({PART}(?:\+{PART})*)", name)
    return (found[1], found[2]) if found else (name, "train")


def _is_list_of_dicts(feature, tfds) -> bool:
    return isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.FeaturesDict)


def _with_lists(record: dict, lists: set[str]) -> dict:
    """TFDS reads a sequence of dicts as a dict of sequences; here it is turned round again, and data sets are lists."""
    for key, value in record.items():
        if key in lists and isinstance(value, dict):
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes | list | tuple):
            value = list(value)
        record[key] = value
    return record


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
