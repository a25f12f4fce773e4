"""Files as bytes, local or remote, plain or packed; and what is remembered of the large ones.

In a cache folder lie, of files from `CACHED_FROM` bytes on, the sha256 and the places of the lines, and whole the
content of files that are packed or remote: that is then memory-mapped like any local file. A name in the folder says
which file it is of and in which state (size, times of change, inode), so nothing of a changed file is ever found.
What is cut short or damaged counts as absent and is made again.
"""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import logging
import mmap
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import zstandard
from etils import epath

from jaxpost.errors import DataError

CACHED_FROM = 1 << 24  # bytes (packed ones: 1/16); smaller files are read as quickly as what would be remembered
SPARE = 1 << 28  # bytes that unpacking leaves free on the disk
CHUNK = 1 << 23  # bytes handled at once
FORMAT = "jaxpost index 1"

log = logging.getLogger("jaxpost")
Buffer = bytes | mmap.mmap


def is_remote(path) -> bool:
    return "://" in os.fspath(path)


def check_file(path) -> epath.Path:
    """The path as an epath. Raises DataError where there is no such file."""
    file = epath.Path(path)
    if not file.exists():
        raise DataError(f"{path}: no such file")
    if file.is_dir():
        raise DataError(f"{path}: is a folder, where a file was expected")
    return file


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place in the cache of one file in one state: names that begin with a digest of each."""

    folder: epath.Path
    path: str
    state: str

    @classmethod
    def of(cls, path, cache, least: int | None = None) -> "Slot | None":
        """None: without a cache, for a file of fewer than `least` (CACHED_FROM) bytes, or one whose time of change says
        nothing."""
        state = _state(path) if cache is not None else None
        if state is None or state[0] < (CACHED_FROM if least is None else least):
            return None
        return cls(epath.Path(cache), _digest(_absolute(path)), _digest(repr(state)))

    def file(self, kind: str) -> epath.Path:
        return self.folder / f"{self.path}-{self.state}.{kind}"

    def holds_for(self, path) -> bool:
        """Whether the file still is in this state."""
        return self.state == _digest(repr(_state(path)))

    def save(self, kind: str, chunks: Iterator[bytes]) -> epath.Path:
        """Writes a file of this slot, whole or not at all, and removes what was kept of earlier states.

        kind may hold `{bytes}`, which becomes the number of bytes written. Raises DataError where the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.file(f"{uuid.uuid4().hex}.partial")
        written = 0
        try:
            with partial.open("wb") as out:
                for chunk in chunks:
                    if shutil.disk_usage(self.folder).free < len(chunk) + SPARE:
                        raise DataError(f"{self.folder}: no room for this cache of data files; free some of the disk")
                    out.write(chunk)
                    written += len(chunk)
            made = self.file(kind.format(bytes=written))
            partial.replace(made)
        finally:
            partial.unlink(missing_ok=True)
        for old in self.folder.glob(f"{self.path}-*"):
            if not old.name.startswith(f"{self.path}-{self.state}."):
                with contextlib.suppress(OSError):  # another process was quicker, or has it open
                    old.unlink()
        return made


def _state(path) -> tuple | None:
    """Size and whatever else tells two states of a file apart; None where that cannot be told."""
    if is_remote(path):
        stat = epath.Path(path).stat()
        return (stat.length, stat.mtime) if stat.mtime else None
    stat = os.stat(path)
    whole_seconds = stat.st_mtime_ns % 10**9 == 0  # of such a file system a second change might not be seen
    if whole_seconds and abs(time.time() - stat.st_mtime) < 2:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _absolute(path) -> str:
    return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


# --- content ----------------------------------------------------------------------------------------------------------


def read(path, cache=None) -> tuple[Buffer, Slot | None]:
    """The unpacked content, memory-mapped where it lies on a local disk; and the file's slot in the cache.

    A large packed or remote file is written to the cache once, with a line in the log; without a cache it is held in
    memory. Raises DataError: no such file, broken packing, no room.
    """
    file = check_file(path)
    packed = unpacked_name(path) != os.fspath(path)
    slot = Slot.of(path, cache, least=CACHED_FROM // 16 if packed else CACHED_FROM)
    if not packed and not is_remote(path):
        return _map(file), slot
    chunks = _unpacked(file) if packed else _chunks(file)
    if slot is None:
        return b"".join(chunks), None
    return _map(_kept(path, slot, chunks)), slot


def local(path, cache=None) -> str:
    """A local file with the content of `path`: itself, or the copy of a remote file in the cache.

    Raises DataError: no such file, or a remote one of which no copy can be kept.
    """
    file = check_file(path)
    if not is_remote(path):
        return os.fspath(file)
    slot = Slot.of(path, cache, least=0)
    if slot is None:
        raise DataError(f"{path}: files of this kind are read from a local disk; copy it there")
    return os.fspath(_kept(path, slot, _chunks(file)))


def unpacked_name(path) -> str:
    """The name without `.gz` or `.zst`."""
    name = os.fspath(path)
    return name[: name.rindex(".")] if name.lower().endswith((".gz", ".zst")) else name


def _kept(path, slot: Slot, chunks: Iterator[bytes]) -> epath.Path:
    for found in slot.folder.glob(f"{slot.file('*').name}.content"):
        if found.name.split(".")[-2] == str(found.stat().length):
            return found
    started = time.monotonic()
    made = slot.save("{bytes}.content", chunks)
    size, seconds = made.stat().length / 1e9, time.monotonic() - started
    log.info("%s: unpacked once, %.2f GB in %.0f s, into %s", path, size, seconds, made)
    return made


def _map(file: epath.Path) -> Buffer:
    if file.stat().length == 0:  # nothing can be mapped of it
        return b""
    with open(os.fspath(file), "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _chunks(file: epath.Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            yield chunk


def _unpacked(file: epath.Path) -> Iterator[bytes]:
    """Raises DataError where the file is broken or cut short."""
    unpack = _gunzip if file.suffix.lower() == ".gz" else _unzstd
    kind = "gzip" if file.suffix.lower() == ".gz" else "zstd"
    try:
        yield from unpack(file)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{file}: broken {kind} file ({error})") from None


def _gunzip(file: epath.Path) -> Iterator[bytes]:
    with file.open("rb") as opened, gzip.GzipFile(fileobj=opened) as unpacked:
        while chunk := unpacked.read(CHUNK):
            yield chunk


def _unzstd(file: epath.Path) -> Iterator[bytes]:
    """By hand, since zstandard's own stream reader ends without a word where a frame is cut short."""
    frame, fresh = None, True
    for chunk in _chunks(file):
        while chunk:
            if fresh:
                frame, fresh = zstandard.ZstdDecompressor().decompressobj(), False
            if unpacked := frame.decompress(chunk):
                yield unpacked
            fresh = frame.eof
            chunk = frame.unused_data if fresh else b""
    if not fresh:
        raise EOFError("it ends within a frame")


# --- what is remembered of it -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Index:
    """sha256 of the content; ends int64[lines]: where each line's newline is (or would be); blank: lines of nothing."""

    sha256: str
    ends: np.ndarray
    blank: np.ndarray

    def chunks(self) -> Iterator[bytes]:
        """As a file: one line of JSON, padded to 8 bytes, then the arrays, little-endian."""
        body = np.concatenate([self.ends, self.blank]).astype("<i8").data
        header = json.dumps(
            {
                "format": FORMAT,
                "sha256": self.sha256,
                "lines": len(self.ends),
                "blank": len(self.blank),
                "crc32": zlib.crc32(body),
            }
        )
        yield (header + " " * (-(len(header) + 1) % 8) + "\n").encode()
        yield body

    @classmethod
    def open(cls, file: epath.Path) -> "Index | None":
        """None where there is none, or a damaged one."""
        if not file.exists() or not (data := _map(file)):
            return None
        line, _, _ = data[:CHUNK].partition(b"\n")
        try:
            header = json.loads(line)
            if header["format"] != FORMAT:
                return None
            body = np.frombuffer(data, "<i8", offset=len(line) + 1)
            if len(body) != header["lines"] + header["blank"] or zlib.crc32(body) != header["crc32"]:
                return None
        except (ValueError, TypeError, KeyError):  # not text, not JSON, not an object, no whole number of values
            return None
        return cls(header["sha256"], body[: header["lines"]], body[header["lines"] :])


def index_lines(path, data: Buffer, slot: Slot | None) -> Index:
    """The index of a content that `read` gave, from the cache or made (and kept there)."""
    return _remembered(path, slot, "lines", lambda: _index(data))


def sha256(path, cache=None) -> str:
    """Of a local file's bytes as they are, from the cache or read."""
    empty = np.zeros(0, np.int64)
    whole = lambda: Index(_sha256(_map(epath.Path(path))), empty, empty)  # noqa: E731
    return _remembered(path, Slot.of(path, cache), "sha256", whole).sha256


def combined(*parts: str) -> str:
    """The fingerprint of something made of several."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _remembered(path, slot: Slot | None, kind: str, make: Callable[[], Index]) -> Index:
    if slot is not None and (found := Index.open(slot.file(kind))):
        return found
    made = make()
    if slot is not None and slot.holds_for(path):
        slot.save(kind, made.chunks())
    return made


def _sha256(data: Buffer) -> str:
    return hashlib.sha256(data).hexdigest()


def _index(data: Buffer, chunk: int = CHUNK) -> Index:
    """By chunks, each hashed and searched while it is at hand: no second copy of many gigabytes in memory."""
    codes = np.frombuffer(data, np.uint8)
    digest, found = hashlib.sha256(), []
    for start in range(0, len(codes), chunk):
        part = codes[start : start + chunk]
        digest.update(part)
        found.append(start + np.flatnonzero(part == ord("\n")))
    ends = np.concatenate([*found, [len(codes)]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    # Only lines that begin with white space, or are empty, may be blank: few or none in any real file.
    first = codes[np.minimum(starts, len(codes) - 1)]
    may_be = np.flatnonzero((starts == ends) | np.isin(first, list(b" \t\r")))
    blank = [i for i in may_be.tolist() if not data[starts[i] : ends[i]].strip()]
    return Index(digest.hexdigest(), ends, np.array(blank, np.int64))


def expand(pattern: str) -> list[str]:
    """Files of a pattern such as `data/*.jsonl.gz`, sorted; `**` stands for folders at any depth of a local disk."""
    if not is_remote(pattern):
        return sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
    if "**" in pattern:
        raise DataError(f"{pattern}: ** is for local patterns; a remote one names each folder, or * for any")
    root, first = epath.Path(pattern), ""
    while glob.has_magic(os.fspath(root)):
        root, first = root.parent, f"{root.name}/{first}"
    return sorted(os.fspath(file) for file in root.glob(first.rstrip("/")) if not file.is_dir())
