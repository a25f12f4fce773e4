"""A dataset: files of records as a sequence of documents, and a report of what became of them."""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rich.progress
from rich.console import Console

from jaxpost.data import quality
from jaxpost.data.cache import Cache
from jaxpost.data.chunks import Chunk, Encoding, Fault
from jaxpost.data.documents import Documents, LazyDocuments
from jaxpost.data.formats import FORMATS, Example, ExampleFault, detect, file_beside
from jaxpost.data.mixture import amounts, mix
from jaxpost.data.questions import asks, read
from jaxpost.data.report import Report
from jaxpost.data.sources import Source, open_source
from jaxpost.data.sources.files import sha256
from jaxpost.data.templates import Template
from jaxpost.data.tokenizers import Tokenizer
from jaxpost.data.workers import Encoder, Job, Task, Workers, cores
from jaxpost.errors import ConfigError, DataError
from jaxpost.keys import QualityConfig
from jaxpost.types import Origin

FOLDERS = ("tokens", "sources")  # of cache_dir
CHUNK = 1024  # records of a chunk that is kept on disk
PIECE = 256  # most records of a task of a window
LAZY_RECORDS = 100_000  # not yet in the cache: from here on "auto" does not tokenise them all before the first step
WORTH_SECONDS = 4.0  # of work left for one process: from here on it is worth starting others
MOST_WORKERS = 16  # that are started unasked
MOST_LAZY_WORKERS = 4


@dataclasses.dataclass(frozen=True)
class Dataset:
    """documents: see data/documents.py. sources: the opened files, names: their paths.

    fingerprint: sha256 of the documents' tokens and weights, which is of the result and not of what went in: a template
    may write today's date, which no key of the input tells. None where they are not all tokenised. kind: what it was
    loaded as. removed: what the quality settings left out; compared: the evaluation files that they name.
    """

    documents: Documents | LazyDocuments
    report: Report
    fingerprint: str | None
    names: tuple[str, ...]
    sources: tuple[Source, ...]
    kind: str
    removed: tuple[quality.Removal, ...]
    compared: tuple[Source, ...]

    @property
    def files(self) -> dict[str, str]:
        """{path: sha256} of all that was read: sources, files that complete their records, evaluation files."""
        found = {source.path: source.fingerprint for source in (*self.sources, *self.compared)}
        for source, name in zip(self.sources, self.report.formats, strict=True):
            if beside := FORMATS[name].beside:
                paths = {source[index][1].path for index in range(len(source))}
                found |= {other: sha256(other) for other in sorted(file_beside(path, beside) for path in paths)}
        return found

    def record(self, example_id: int) -> tuple[dict, Origin]:
        """The record behind the documents of this `example_id`."""
        return self._find(example_id)[:2]

    def example(self, example_id: int) -> Example:
        """The same, read and parsed again."""
        record, origin, format = self._find(example_id)
        return read(record, origin, format, self.kind)

    def _find(self, example_id: int) -> tuple[dict, Origin, str]:
        ends = np.cumsum([len(source) for source in self.sources])
        number = int(np.searchsorted(ends, example_id, "right"))
        source = self.sources[number]
        return *source[example_id - int(ends[number]) + len(source)], self.report.formats[number]


def load_dataset(
    paths,
    *,
    tokenizer: Tokenizer,
    template: Template,
    kind: str,
    max_tokens: int,
    on_bad: str = "drop",
    on_long: str = "drop",
    format: str = "auto",
    row_tokens: int | None = None,
    tokenize: str = "ahead",
    workers: int | None = 0,
    cache_dir=None,
    settings: QualityConfig | None = None,
) -> Dataset:
    """Reads, parses and tokenises files into documents.

    Args:
      paths: a path, a list of paths, or of pairs (path, amount). An amount is a weight (2 takes every example twice,
        0.5 every second one, 1.5 every example and every second one again: by index, so without any draw) or
        {"tokens": n}: as many tokens as whole examples make of it, repeated or cut, the same ones in every epoch.
      kind: "sft" (conversations, prompts with completions, raw text), "preference" (pairs), "scored" (pairs with
        scores), "ranking" (also pairs), "unpaired" (single completions with a label) or "prompt" (what is asked in
        any of these: see `question`).
      max_tokens: longest prompt and completion together, in tokens.
      on_bad: a faulty example is dropped and counted ("drop") or ends the reading ("error").
      on_long: what becomes of an example beyond max_tokens: "drop" or "truncate" (see `encode`).
      format: name of a format, or "auto" to detect it per file; it then holds for all records of the file.
      row_tokens: a document that takes more in a row is dropped under `longer_than_row`.
      tokenize: "ahead" of everything, "lazy" by windows as they are asked for, or "auto": lazy where much is not
        cached and records can be read one by one. The documents and their order are the same.
      workers: processes that tokenise; 0 = this one; None = by cores and work. The result does not depend on it.
      cache_dir: folder of tokenised chunks and of indices of large files, which a later call reads; None = none.
      settings: which examples are left out for the quality of the data (data/quality); None = none.

    Raises:
      DataError: a fault of a file (missing, empty, broken, of another kind, of mixed formats); with on_bad="error"
        any fault; nothing left after dropping. Lazy documents raise it when met.
    """
    pairs = amounts(paths)
    tokens_kept, sources_kept = (f"{os.fspath(cache_dir)}/{name}" if cache_dir else None for name in FOLDERS)
    sources = tuple(open_source(path, sources_kept) for path, _ in pairs)
    formats = [_format(source, format, kind) for source in sources]
    options = (kind, template, tokenizer, max_tokens, on_long, row_tokens)
    jobs = [
        Job(os.fspath(path), source.fingerprint, Encoding(name, format == "auto", *options), sources_kept)
        for (path, _), source, name in zip(pairs, sources, formats, strict=True)
    ]
    report = Report(tuple(source.path for source in sources), formats)
    settings = settings or QualityConfig()
    removed = _removed(sources, formats, kind, settings, sources_kept) if settings.on else {}
    compared = tuple(open_source(path, sources_kept) for path in settings.decontaminate)
    left_out = tuple(removed.values())
    records = _Records(sources, jobs, report, on_bad, workers, removed)
    caches = [Cache(tokens_kept, job) for job in jobs]
    counts = [len(source) for source in sources]
    if _is_lazy(tokenize, pairs, sources, lambda: records.missing(caches)):
        report.lazy = True
        documents = LazyDocuments(mix(report.names, counts, pairs), records.encode, records.close)
        return Dataset(documents, report, None, report.names, sources, kind, left_out, compared)
    chunks = list(records.all(caches))
    tokens = np.concatenate([chunk.record_costs for chunk in chunks])
    documents = Documents(chunks, mix(report.names, counts, pairs, tokens))
    if not len(documents):
        faults = report.faults() or "the weights take no example"
        raise DataError(f"{', '.join(report.names)}: nothing left: {faults}")
    report.measure(documents)
    return Dataset(documents, report, documents.fingerprint(), report.names, sources, kind, left_out, compared)


def _is_lazy(tokenize: str, pairs, sources: Sequence[Source], missing: Callable[[], int]) -> bool:
    """Whether to tokenise as the documents are asked for. missing: () -> records that are in no cache."""
    budgets = any(isinstance(amount, dict) for _, amount in pairs)
    if tokenize == "lazy" and budgets:
        raise ConfigError("data.tokenize: 'lazy' cannot fill a budget of tokens; give weights, or tokenize='ahead'")
    if tokenize != "auto":
        return tokenize == "lazy"
    by_blocks = any(getattr(source, "by_blocks", False) for source in sources)
    return not (budgets or by_blocks) and missing() >= LAZY_RECORDS


def _format(source: Source, format: str, kind: str) -> str:
    """The format of a source, by its first record; DataError where it holds another kind of data."""
    detects = asks if kind == "prompt" else detect
    name = detects(*source[0]) if format == "auto" else format
    if name in FORMATS and not FORMATS[name].fits(kind):
        fitting = ", ".join(f.name for f in FORMATS.values() if f.fits(kind))
        raise DataError(
            f"{source.path}: found the format {name}, which holds {FORMATS[name].kind} data; "
            f"{kind} training takes {fitting}"
        )
    return name


def _removed(sources, formats, kind: str, settings: QualityConfig, cache) -> dict[int, quality.Removal]:
    """{example id: why it is left out}. Faulty examples are left to the encoding, which counts them."""
    ids: list[int] = []

    def examples(advance) -> Iterator[Example]:
        numbered = itertools.count()
        for source, name in zip(sources, formats, strict=True):
            for index in range(len(source)):
                advance(1)
                example_id, (record, origin) = next(numbered), source[index]
                try:
                    example = read(record, origin, name, kind)
                except ExampleFault:
                    continue
                ids.append(example_id)
                yield example

    with _progress("looking at the quality", sum(map(len, sources))) as advance:
        kept, removals = quality.select(examples(advance), settings, cache=cache)
    return dict(zip(np.array(ids)[~kept].tolist(), removals, strict=True))


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar, where somebody can see it; gives what advances it."""
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    console = Console()
    hidden = not (total and console.is_terminal)
    with rich.progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        shown = bar.add_task(what, total=total)
        yield lambda count: bar.advance(shown, count)


class _Records:
    """All records of the sources, numbered one after another, and what encodes them."""

    def __init__(
        self, sources: Sequence[Source], jobs: list[Job], report: Report, on_bad: str, workers: int | None, removed
    ):
        self.report, self._removed = report, removed
        self._jobs, self._on_bad = jobs, on_bad
        self._counts = [len(source) for source in sources]
        self._first_ids = np.cumsum([0, *self._counts])
        self._encoder = Encoder(jobs, dict(enumerate(sources)))
        self._worker_count, self._workers = workers, None
        self._met: np.ndarray | None = None  # bool[records], of lazy reading: those that the report counts

    def missing(self, caches: list[Cache]) -> int:
        """Records that are in no cache."""
        return sum(len(task.records) for task in self._tasks() if not caches[task.job].has(*_span(task)))

    def all(self, caches: list[Cache]) -> Iterator[Chunk]:
        """The chunks of all records in order, from the cache or encoded; the report counts them."""
        tasks = self._tasks()
        kept = [caches[task.job].has(*_span(task)) for task in tasks]
        fresh = self._encode_all([task for task, known in zip(tasks, kept, strict=True) if not known])
        try:
            for task, known in zip(tasks, kept, strict=True):
                cache, span = caches[task.job], _span(task)
                chunk = cache.read(*span) if known else next(fresh)
                if chunk is None or not known:
                    chunk = chunk or self._encoder.encode(task)  # what is damaged is made again
                    cache.write(*span, chunk)
                chunk = self._less_removed(task, chunk)
                self.report.add(chunk, self._on_bad)
                yield chunk
        finally:
            fresh.close()
            self.close()

    def encode(self, example_ids: np.ndarray) -> list[Chunk]:
        """The chunks of these examples, which are sorted and distinct; the report counts those that are new."""
        if self._met is None:
            self._met = np.zeros(self._first_ids[-1], bool)
        bounds = np.searchsorted(example_ids, self._first_ids)
        tasks = [
            Task(job, example_ids[start : min(start + PIECE, bounds[job + 1])] - self._first_ids[job])
            for job in range(len(self._jobs))
            for start in range(bounds[job], bounds[job + 1], PIECE)
        ]
        count = min(MOST_LAZY_WORKERS, cores() - 1) if self._worker_count is None else self._worker_count
        chunks = list(self._started(count).map(tasks)) if count else list(map(self._encoder.encode, tasks))
        chunks = list(map(self._less_removed, tasks, chunks))
        for task, chunk in zip(tasks, chunks, strict=True):
            ids = task.records + self._first_ids[task.job]
            self.report.add(chunk, self._on_bad, ~self._met[ids])
            self._met[ids] = True
        return chunks

    def _less_removed(self, task: Task, chunk: Chunk) -> Chunk:
        ids = enumerate((task.records + self._first_ids[task.job]).tolist())
        found = [(position, self._removed[n]) for position, n in ids if n in self._removed]
        faults = [Fault(position, r.reason, str(r), r.origin.path, r.origin.line) for position, r in found]
        return chunk.without(faults) if faults else chunk

    def close(self) -> None:
        """Ends the processes; more of them start where more is to be encoded."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _tasks(self) -> list[Task]:
        return [
            Task(job, np.arange(start, min(start + CHUNK, count)))
            for job, count in enumerate(self._counts)
            for start in range(0, count, CHUNK)
        ]

    def _encode_all(self, tasks: list[Task]) -> Iterator[Chunk]:
        """Encodes tasks in their order, with a progress bar."""
        with _progress("tokenising", sum(len(task.records) for task in tasks)) as advance:
            for task, chunk in zip(tasks, self._chunks_of(tasks), strict=True):
                advance(len(task.records))
                yield chunk

    def _chunks_of(self, tasks: list[Task]) -> Iterator[Chunk]:
        """In this process as long as the work left is not worth the start of others, or they are asked for."""
        count, started = self._worker_count, time.perf_counter()
        for number, task in enumerate(tasks):
            if count is None:
                left = (time.perf_counter() - started) / max(number, 1) * (len(tasks) - number)
                several = min(cores(), MOST_WORKERS) if left > WORTH_SECONDS and cores() > 1 else 0
            else:
                several = count if len(tasks) > 1 else 0
            if several:
                yield from self._started(several).map(tasks[number:])
                return
            yield self._encoder.encode(task)

    def _started(self, count: int) -> Workers:
        if self._workers is None:
            self._workers = Workers(count, self._jobs)
        return self._workers


def _span(task: Task) -> tuple[int, int]:
    return int(task.records[0]), int(task.records[-1]) + 1
