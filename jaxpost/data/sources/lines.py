"""JSON: lines that are found by their offsets, or one list."""

import json

import numpy as np

from jaxpost.data.sources import files
from jaxpost.errors import DataError
from jaxpost.types import Origin


def open_json(path, cache=None):
    """A JSON list of objects or JSON lines, by the first character that is not white space: both are called `.json`."""
    data, slot = files.read(path, cache)
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise DataError(f"{path}: the file is empty")
    index = files.index_lines(path, data, slot)
    return (JsonList if head.startswith(b"[") else JsonLines)(str(path), data, index)


def parse(raw: bytes, origin: Origin) -> dict:
    """One record. Raises DataError: not UTF-8, not JSON, not an object."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: broken JSON at column {error.colno} ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 ({error.reason})") from None
    return _object(record, origin)


def _object(record, origin: Origin) -> dict:
    if not isinstance(record, dict):
        raise DataError(f"{origin}: a record must be a JSON object, found {type(record).__name__}")
    return record


class JsonLines:
    """One JSON object a line, parsed when asked for; blank lines are passed over."""

    def __init__(self, path: str, data: files.Buffer, index: files.Index):
        self.path, self.fingerprint = path, index.sha256
        self._data, self._ends = data, index.ends
        lines = len(index.ends)
        # Without blank lines no array is made: of the index in the cache only what is asked for is read.
        self._lines = np.delete(np.arange(lines), index.blank) if len(index.blank) else range(lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[dict, Origin]:
        line = int(self._lines[index])
        origin = Origin(self.path, line + 1)
        start = self._ends[line - 1] + 1 if line else 0
        return parse(self._data[start : self._ends[line]], origin), origin


class JsonList:
    """A file that is one JSON list of objects; the line of an origin is the 1-based place in the list."""

    def __init__(self, path: str, data: files.Buffer, index: files.Index):
        self.path, self.fingerprint = path, index.sha256
        try:
            self._records = json.loads(data[:].decode("utf-8-sig"))
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
