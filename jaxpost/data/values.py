"""Per-token values of a data set on disk: reference log-probabilities are computed once and read by every later run.

A file is one line of JSON, the number of completions of each document (int32), the number of tokens of each completion
(int32) and the values (f32 or int32, `width` of them a token), all in the order of the documents, little-endian.
"""

import dataclasses
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
from etils import epath

from jaxpost.errors import DataError
from jaxpost.types import Array, Document

FORMAT = "jaxpost values 1"
HEADER_BYTES = 4096  # more than the first line ever takes
TYPES = {"f4": (np.dtype("<f4"), np.nan), "i4": (np.dtype("<i4"), -1)}  # by name: the type, and what stands for unset


def key(**parts) -> str:
    """A digest of all that the values depend on (model, data, template, tokenizer, ...), by name; JSON values only."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class ValueStore(Sequence):
    """`store[i]` is the values of document i: an array [C_n], or [C_n, width], for each of its completions.

    Make one for documents, set every item, save it; or open one that was saved. An opened local file is memory-mapped,
    so items are read when asked for; a remote one is read whole.
    """

    def __init__(self, counts: Array, lengths: Array, values: Array):
        """counts int[documents]: completions of each; lengths int[completions]: tokens of each; values [tokens, ...],
        f32, or int32 from 0 on."""
        self._counts, self._lengths, self._values = counts, lengths, values
        self._completion_ends = np.cumsum(counts, dtype=np.int64)
        self._token_ends = np.cumsum(lengths, dtype=np.int64)

    @classmethod
    def for_documents(cls, documents: Iterable[Document], width: int | None = None, type: str = "f4") -> Self:
        """A store in memory with room for the values of these documents, none of them set. type: of `TYPES`."""
        lengths = [[len(completion) for completion in document.completions] for document in documents]
        counts = np.array([len(document) for document in lengths], np.int32)
        flat = np.array([length for document in lengths for length in document], np.int32)
        dtype, unset = TYPES[type]
        return cls(counts, flat, np.full((flat.sum(), *([] if width is None else [width])), unset, dtype))

    @classmethod
    def open(cls, path: epath.PathLike, key: str) -> Self | None:
        """The store saved at `path` under `key`. None if there is none; a file of another key, cut short or not a store
        also counts as none, with a warning that names it."""
        path = epath.Path(path)
        if not path.exists():
            return None
        try:
            return cls._parse(_read(path), key)
        except ValueError as error:
            warnings.warn(f"{path}: not used, {error}; the values are computed again", stacklevel=2)
            return None

    @classmethod
    def _parse(cls, data: np.ndarray, key: str) -> Self:
        line, _, _ = data[:HEADER_BYTES].tobytes().partition(b"\n")
        header = _header(line)
        if header.get("key") != key:
            raise ValueError("it belongs to another model, data set or template")
        sizes, width = [header["documents"], header["completions"], header["tokens"]], header.get("width")
        expected = len(line) + 1 + 4 * (sizes[0] + sizes[1] + sizes[2] * (1 if width is None else width))
        if len(data) != expected:
            raise ValueError(f"it has {len(data)} bytes, a whole one would have {expected}")
        counts, lengths, values = np.split(data[len(line) + 1 :].view("<i4"), np.cumsum(sizes[:-1]))
        values = values.view(TYPES[header.get("type", "f4")][0])
        return cls(counts, lengths, values if width is None else values.reshape(sizes[2], width))

    def save(self, path: epath.PathLike, key: str) -> None:
        """Writes the store; the file appears under its name only once it is whole, in place of one that was there.

        Raises:
          DataError: the values of a document are not set, or not numbers.
        """
        values = self._values
        type = next(name for name, (dtype, _) in TYPES.items() if dtype == values.dtype)
        missing = np.isnan(values) if type == "f4" else values < 0
        unset = np.flatnonzero(missing if values.ndim == 1 else missing.any(1))
        if unset.size:
            completion = np.searchsorted(self._token_ends, unset[0], side="right")
            document = np.searchsorted(self._completion_ends, completion, side="right")
            raise DataError(f"{path}: the values of document {document} are not set, or not numbers")
        sizes = {"documents": self._counts.size, "completions": self._lengths.size, "tokens": len(values)}
        sizes |= {} if values.ndim == 1 else {"width": values.shape[1]}
        header = json.dumps({"format": FORMAT, "key": key, **sizes, **({} if type == "f4" else {"type": type})})
        header += " " * (-(len(header) + 1) % 4) + "\n"  # the arrays behind it are aligned
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
        try:
            with partial.open("wb") as file:
                file.write(header.encode())
                for array, dtype in ((self._counts, "<i4"), (self._lengths, "<i4"), (values, TYPES[type][0])):
                    file.write(array.astype(dtype, copy=False).data)
                file.flush()
                if not _is_remote(path):
                    os.fsync(file.fileno())  # or a power cut could leave the name without the data
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        return tuple(self._values[tokens] for tokens in self._token_slices(index))

    def __setitem__(self, index: int, completions: Sequence[Array]) -> None:
        """Sets the values of a document: [C_n, ...] for each completion. Raises ValueError where the shapes differ."""
        for tokens, values in zip(self._token_slices(index), completions, strict=True):
            if np.shape(values) != (tokens.stop - tokens.start, *self._values.shape[1:]):
                raise ValueError(f"document {index}: {np.shape(values)} values, {tokens.stop - tokens.start} tokens")
            self._values[tokens] = values

    def _token_slices(self, index: int) -> list[slice]:
        index = range(len(self))[index]  # IndexError beyond the end; counts from the end where negative
        last = self._completion_ends[index]
        ends = self._token_ends[last - self._counts[index] : last]
        lengths = self._lengths[last - self._counts[index] : last]
        return [slice(start, end) for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]


def attach(documents: Sequence[Document], name: str, store: ValueStore) -> Sequence[Document]:
    """The documents with `token[name]` from the store, read when a document is asked for.

    Raises:
      DataError: the store has another number of documents; or, when asked for, a document other lengths.
    """
    if len(documents) != len(store):
        raise DataError(f"{name}: values of {len(store)} documents, but the data has {len(documents)}")
    return _Attached(documents, name, store)


class _Attached(Sequence):
    def __init__(self, documents: Sequence[Document], name: str, store: ValueStore):
        self._documents, self._name, self._store = documents, name, store

    def __len__(self) -> int:
        return len(self._documents)

    def __getattr__(self, name: str):
        """What else the documents know (`members`, `mixture`, ...) holds for these too."""
        return getattr(self._documents, name)

    def __getitem__(self, index: int) -> Document:
        document, values = self._documents[index], self._store[index]
        if [len(v) for v in values] != [len(c) for c in document.completions]:
            raise DataError(f"{document.origin}: {self._name} has values for other completions than these")
        return dataclasses.replace(document, token={**document.token, self._name: values})


def _header(line: bytes) -> dict:
    try:
        header = json.loads(line)
        if header["format"] == FORMAT:
            return header
    except (ValueError, TypeError, KeyError):  # not text, not JSON, not an object, no such field
        pass
    raise ValueError("it is not a file of values")


def _read(path: epath.Path) -> np.ndarray:
    """The file's bytes, uint8."""
    if _is_remote(path) or path.stat().length == 0:  # nothing can be mapped of an empty file
        return np.frombuffer(path.read_bytes(), np.uint8)
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)
