"""What every source is, and what several kinds of them share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from jaxpost.data.sources import files
from jaxpost.errors import DataError
from jaxpost.types import Origin

BLOCK = 256  # rows of a table made into Python objects at once


class Source(Protocol):
    """Records by index. `fingerprint` is a sha256 of the content."""

    path: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[dict, Origin]: ...


class Joined:
    """Several sources one after another; origins name the real file."""

    def __init__(self, path: str, sources: Sequence[Source]):
        self.path, self._sources = path, sources
        self.fingerprint = files.combined(*(source.fingerprint for source in sources))
        self._ends = np.cumsum([len(source) for source in sources])
        self.by_blocks = any(getattr(source, "by_blocks", False) for source in sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[dict, Origin]:
        index = range(len(self))[index]
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[which][index - int(self._ends[which]) + len(self._sources[which])]


class Blocks:
    """Rows that are read a block at a time: `read(start, stop) -> rows`; the last few blocks are kept.

    by_blocks: rows from all over the table, as a random order asks for them, cost a block each.
    """

    by_blocks = True

    def __init__(self, path: str, fingerprint: str, length: int, read: Callable[[int, int], Sequence[dict]]):
        self.path, self.fingerprint, self._length = path, fingerprint, length
        if not length:
            raise DataError(f"{path}: holds no records")
        self._block = functools.lru_cache(8)(lambda n: read(n * BLOCK, min((n + 1) * BLOCK, length)))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[dict, Origin]:
        index = range(self._length)[index]
        return plain(self._block(index // BLOCK)[index % BLOCK]), Origin(self.path, index + 1)


def plain(value: Any) -> Any:
    """Values of a table as JSON has them: text for UTF-8 bytes, lists for arrays, and no key without a value.

    A table's rows all have the same fields, those of structs too; where a file of JSON would leave one out, it is null.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:  # an image, perhaps; a format that wants text there will say so
            return value
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def require(module: str, extra: str, what: str):
    """Imports a module of an extra. Raises DataError that names the extra."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(f"{what} needs the package {error.name}: pip install 'jaxpost[{extra}]'") from None
