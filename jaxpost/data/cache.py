"""Tokenised chunks on disk: a second run of the same files, template and tokenizer does not tokenise again."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import re
import uuid

from etils import epath

from jaxpost.data.chunks import Chunk
from jaxpost.data.formats import FORMATS
from jaxpost.data.workers import Job

VERSION = 1  # of the layout of a chunk
CLOCK = re.compile(r"""strftime_now\(\s*(?:'([^'"]*)'|"([^'"]*)")\s*\)""")
BELOW_A_DAY = re.compile(r"%[-_0^#]?[HIklMSfpPsXTRrcz+]")  # what strftime writes that changes within a day

log = logging.getLogger("jaxpost")


class Cache:
    """The chunks of one job: files named by the records they cover, in a folder named by all that decides them."""

    def __init__(self, folder, job: Job):
        digest = job_digest(job)
        self.folder = epath.Path(folder) / digest[:40] if folder and digest else None  # None: nothing is kept

    def has(self, start: int, stop: int) -> bool:
        return self.folder is not None and self._path(start, stop).exists()

    def read(self, start: int, stop: int) -> Chunk | None:
        """The chunk of these records. None where there is none, and, with a warning, where it is damaged."""
        if not self.has(start, stop):
            return None
        path = self._path(start, stop)
        try:
            return Chunk.unpack(path.read_bytes())
        except ValueError as error:
            log.warning("%s: not used, %s; its records are tokenised again", path, error)
            return None

    def write(self, start: int, stop: int, chunk: Chunk) -> None:
        """Keeps a chunk; it appears under its name only once it is whole."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{uuid.uuid4().hex}.partial"
        try:
            partial.write_bytes(chunk.pack())
            partial.replace(self._path(start, stop))
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, start: int, stop: int) -> epath.Path:
        return self.folder / f"{start}-{stop}.npz"


def job_digest(job: Job) -> str | None:
    """sha256 of all that decides a job's chunks; None where that cannot be told: the template writes the time of day,
    or the records are completed from another file."""
    path, fingerprint, encoding, _ = job
    source = encoding.template.source
    if encoding.format in FORMATS and FORMATS[encoding.format].beside:
        return None
    today = None
    if "strftime_now(" in source:
        formats = [match[1] or match[2] or "" for match in CLOCK.finditer(source)]
        if len(formats) < source.count("strftime_now(") or any(BELOW_A_DAY.search(form) for form in formats):
            return None
        today = datetime.date.today().isoformat()
    parts = {
        "version": VERSION,
        "code": code_digest(),
        "source": [path, fingerprint],
        "format": [encoding.format, encoding.detected, encoding.kind],
        "template": encoding.template.fingerprint,
        "tokenizer": encoding.tokenizer.fingerprint,
        "limits": [encoding.max_tokens, encoding.on_long, encoding.row_tokens],
        "today": today,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def code_digest() -> str:
    """sha256 of the sources of this package of ours and of the versions of the libraries that tokenise and render."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for library in ("jinja2", "numpy", "sentencepiece", "tokenizers"):
        digest.update(f"{library} {importlib.metadata.version(library)}".encode())
    return digest.hexdigest()
