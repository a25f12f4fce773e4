"""Sources: files and data sets of records with random access, `open_source(path)[i] -> (record, Origin)`.

A kind of file is known by its suffix (`READERS`), a data set by its prefix or by what lies in its folder.
"""

import glob
import logging
import os

from etils import epath

from jaxpost.data.sources import files
from jaxpost.data.sources.base import Joined, Source
from jaxpost.data.sources.lines import open_json
from jaxpost.data.sources.prepared import open_hf, open_saved, open_tfds
from jaxpost.data.sources.tables import open_array_record, open_parquet
from jaxpost.errors import DataError

__all__ = ["Joined", "Source", "open_source"]

READERS = {
    ".jsonl": open_json,
    ".json": open_json,
    ".parquet": open_parquet,
    ".array_record": open_array_record,
    ".arrayrecord": open_array_record,
}
PREFIXES = {"tfds:": open_tfds, "hf:": open_hf}  # hf://... is a path, as gs://... is
log = logging.getLogger("jaxpost")


def open_source(path, cache=None) -> Source:
    """Opens what `path` names, local or remote (gs://):

    - a file: .json or .jsonl (also .gz or .zst), .parquet, .array_record;
    - a pattern (`data/*.jsonl.gz`) or a folder of such files, one source in the order of their names;
    - `tfds:NAME[:SPLIT]`, or a folder that TFDS has prepared (its split `train`, others by `tfds:FOLDER:SPLIT`);
    - `hf:NAME[:SPLIT]` of the Hugging Face hub, or a folder written by `save_to_disk`.

    cache: folder for what is remembered of large files (see files.py); None = nothing is remembered.
    Raises DataError: no such file, unknown kind, empty, broken.
    """
    name = os.fspath(path)
    for prefix, opener in PREFIXES.items():
        if name.startswith(prefix) and not name.startswith(f"{prefix}//"):
            return opener(name.removeprefix(prefix), cache)
    file = epath.Path(path)
    if glob.has_magic(name) and not file.exists():
        return _joined(name, files.expand(name), cache, "no file fits this pattern")
    if file.is_dir():
        return _open_folder(name, cache)
    reader = _reader(name)
    if reader is None:
        known = ", ".join(READERS)
        raise DataError(f"{path}: unknown kind of data file; known are {known}, the JSON ones also .gz and .zst")
    return reader(path, cache)


def _open_folder(path: str, cache) -> Source:
    folder = epath.Path(path)
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return open_saved(path, cache)
    if (folder / "features.json").exists():
        return open_tfds(path, cache, path)
    if (folder / "dataset_dict.json").exists():
        splits = sorted(os.fspath(part) for part in folder.iterdir() if part.is_dir())
        raise DataError(f"{path}: a saved Hugging Face DatasetDict; name one of its splits: {', '.join(splits)}")
    inside = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    data = [os.fspath(file) for file in inside if _reader(file.name) and not file.is_dir()]
    if data and (others := [file.name for file in inside if os.fspath(file) not in data]):
        log.info("%s: not data files, passed over: %s", path, ", ".join(others))
    return _joined(path, data, cache, "no data files in this folder")


def _joined(path: str, names: list[str], cache, nothing: str) -> Source:
    if not names:
        raise DataError(f"{path}: {nothing}; known are {', '.join(READERS)}, the JSON ones also .gz and .zst")
    return Joined(path, [open_source(name, cache) for name in names])


def _reader(name: str):
    plain = files.unpacked_name(name)
    for suffix, reader in READERS.items():
        if plain.lower().endswith(suffix) and (plain == name or reader is open_json):
            return reader
    return None
