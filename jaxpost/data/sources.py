"""Sources: files of records with random access, `source[i] -> (record, Origin)`.

Which class reads a file is decided by its suffix (`READERS`); whether JSON is a list or one object a line, by its
first character, since both are in use under the suffix `.json`. A fault of a file is a DataError that names the line.
"""

import gzip
import hashlib
import json
import mmap
import os
from typing import Protocol

import numpy as np
from etils import epath

from jaxpost.errors import DataError
from jaxpost.types import Origin


class Source(Protocol):
    """Records by index. `fingerprint` is the sha256 of the content."""

    path: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[dict, Origin]: ...


def open_source(path) -> Source:
    """Opens a local or gs:// file. Raises DataError: no such file, unknown suffix, empty, not JSON."""
    name = str(path).removesuffix(".gz").lower()
    for suffix, reader in READERS.items():
        if name.endswith(suffix):
            return reader(path)
    raise DataError(f"{path}: unknown kind of data file; known are {', '.join(READERS)}, each also .gz")


def _read(path) -> bytes | mmap.mmap:
    """The content: memory-mapped where it is a plain local file, else in memory (decompressed)."""
    file = epath.Path(path)
    if not file.exists():
        raise DataError(f"{path}: no such file")
    if file.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it")
    if str(path).endswith(".gz"):
        try:
            return gzip.decompress(file.read_bytes())
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: broken gzip file ({error})") from None
    if "://" in str(path) or file.stat().length == 0:
        return file.read_bytes()
    with open(os.fspath(file), "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def open_json(path) -> Source:
    """A JSON list of objects or JSON lines, by the first character that is not white space."""
    content = _read(path)
    head = content[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise DataError(f"{path}: the file is empty")
    return (JsonList if head.startswith(b"[") else JsonLines)(str(path), content)


READERS = {".jsonl": open_json, ".json": open_json}


def _newlines(content: bytes | mmap.mmap, chunk: int = 1 << 26) -> np.ndarray:
    """Offsets of all line ends; by chunks, so that a file of many gigabytes needs no second copy in memory."""
    data = np.frombuffer(content, np.uint8)
    found = [start + np.flatnonzero(data[start : start + chunk] == ord("\n")) for start in range(0, len(data), chunk)]
    return np.concatenate(found)


def _object(record, origin: Origin) -> dict:
    if not isinstance(record, dict):
        raise DataError(f"{origin}: a record must be a JSON object, found {type(record).__name__}")
    return record


class JsonLines:
    """One JSON object a line, parsed when asked for; blank lines are passed over."""

    def __init__(self, path: str, content: bytes | mmap.mmap):
        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._content = content
        newlines = _newlines(content)
        starts = np.concatenate([[0], newlines + 1])
        ends = np.concatenate([newlines, [len(content)]])
        # Only short lines are looked at: of millions of records nearly all are longer.
        blank = [i for i in np.flatnonzero(ends - starts < 16) if not content[starts[i] : ends[i]].strip()]
        self._lines = np.delete(np.arange(len(starts)), blank)
        self._starts, self._ends = starts, ends

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[dict, Origin]:
        line = self._lines[index]
        origin = Origin(self.path, int(line) + 1)
        raw = self._content[self._starts[line] : self._ends[line]]
        try:
            return _object(json.loads(raw.decode("utf-8-sig")), origin), origin
        except json.JSONDecodeError as error:
            raise DataError(f"{origin}: broken JSON at column {error.colno} ({error.msg})") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: not UTF-8 ({error.reason})") from None


class JsonList:
    """A file that is one JSON list of objects; the line of an origin is the 1-based place in the list."""

    def __init__(self, path: str, content: bytes | mmap.mmap):
        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            self._records = json.loads(content[:].decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: broken JSON at column {error.colno} ({error.msg})") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error.reason})") from None
        if not self._records:
            raise DataError(f"{path}: the list is empty")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[dict, Origin]:
        origin = Origin(self.path, range(len(self._records))[index] + 1)
        return _object(self._records[index], origin), origin
