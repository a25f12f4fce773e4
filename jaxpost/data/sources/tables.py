"""Parquet and ArrayRecord: binary files of records with random access."""

import functools

import numpy as np

from jaxpost.data.sources import files, lines
from jaxpost.data.sources.base import Blocks, require
from jaxpost.errors import DataError
from jaxpost.types import Origin

GROUPS_KEPT = 4  # row groups of a Parquet file held in memory


def open_parquet(path, cache=None) -> Blocks:
    """A Parquet file: a record a row. Row groups are read when asked for."""
    parquet = require("pyarrow.parquet", "parquet", f"{path}: reading Parquet")
    file = files.local(path, cache)
    try:
        opened = parquet.ParquetFile(file, memory_map=True)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise DataError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]})") from None
    metadata = opened.metadata
    ends = np.cumsum([metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)])
    group = functools.lru_cache(GROUPS_KEPT)(opened.read_row_group)

    def read(start: int, stop: int) -> list[dict]:
        """Rows of one or more groups."""
        rows = []
        for n in range(np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left") + 1):
            first = int(ends[n]) - metadata.row_group(n).num_rows
            rows += group(n)[max(start - first, 0) : stop - first].to_pylist()
        return rows

    return Blocks(str(path), files.sha256(file, cache), metadata.num_rows, read)


def open_array_record(path, cache=None) -> "ArrayRecord":
    """An ArrayRecord file, each record the UTF-8 bytes of one JSON object."""
    return ArrayRecord(str(path), files.local(path, cache), cache)


class ArrayRecord:
    """Records are read and parsed when asked for; the line of an origin is the 1-based place in the file."""

    def __init__(self, path: str, file: str, cache):
        from array_record.python import array_record_data_source  # comes with grain; seconds to import

        self.path, self.fingerprint = path, files.sha256(file, cache)
        try:
            self._records = array_record_data_source.ArrayRecordDataSource(file)
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{path}: not an ArrayRecord file that can be read ({error})") from None
        if not len(self._records):
            raise DataError(f"{path}: holds no records")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[dict, Origin]:
        index = range(len(self))[index]
        origin = Origin(self.path, index + 1)
        return lines.parse(self._records[index], origin), origin
