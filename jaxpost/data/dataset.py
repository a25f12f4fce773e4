"""A dataset: files of records as a compact sequence of documents, and a report of what became of them."""

import collections
import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Sequence

import numpy as np
import rich.table

from jaxpost.data.encode import encode
from jaxpost.data.formats import FORMATS, Example, ExampleFault, detect, parse
from jaxpost.data.sources import Source, open_source
from jaxpost.data.templates import Template
from jaxpost.data.tokenizers import Tokenizer
from jaxpost.errors import DataError
from jaxpost.types import Document, Origin

ORIGINS_SHOWN = 3
LENGTH_REASONS = ("too_long", "longer_than_row")
PERCENTILES = (50, 90, 99, 100)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """documents: sequence of Document. names: the files. fingerprint: sha256 of the documents' tokens and weights.
    sources: the opened files.

    The fingerprint is of the result, not of what went in: a template may write today's date, which no key of the input
    tells.
    """

    documents: "Documents"
    report: "Report"
    fingerprint: str
    names: tuple[str, ...]
    sources: tuple[Source, ...]

    def example(self, example_id: int) -> Example:
        """The example behind the documents of this `example_id`, read and parsed again."""
        ends = np.cumsum([len(source) for source in self.sources])
        number = int(np.searchsorted(ends, example_id, "right"))
        source = self.sources[number]
        record, origin = source[example_id - int(ends[number]) + len(source)]
        return parse(record, origin, self.report.formats[number])


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
) -> Dataset:
    """Reads, parses and tokenises files into documents.

    Args:
      paths: a path, a list of paths, or a list of (path, weight). A weight of 2 takes every example twice, 0.5 every
        second one, 1.5 every example and every second one again: by index, so without any draw.
      kind: "sft" (conversations, prompts with completions, raw text), "preference" (pairs), "ranking" (also pairs),
        "unpaired" (single completions with a label) or "prompt" (questions alone).
      max_tokens: longest prompt and completion together, in tokens.
      on_bad: a faulty example is dropped and counted ("drop") or ends the reading ("error").
      on_long: what becomes of an example beyond max_tokens: "drop" or "truncate" (see `encode`).
      format: name of a format, or "auto" to detect it per file; it then holds for all records of the file.
      row_tokens: a document that takes more in a row is dropped under `longer_than_row`.

    Raises:
      DataError: a fault of a file (missing, empty, broken, of another kind, of mixed formats); with on_bad="error"
        any fault; nothing left after dropping.
    """
    weighted = _weighted(paths)
    sources = [open_source(path) for path, _ in weighted]
    report = Report(names=tuple(source.path for source in sources))
    builder = _Builder(report.names)
    for number, (source, (_, weight)) in enumerate(zip(sources, weighted, strict=True)):
        first_id = sum(map(len, sources[:number]))
        for index, example in _examples(source, format, kind, report, on_bad):
            report.read += 1
            try:
                encoded = encode(
                    example,
                    first_id + index,
                    template=template,
                    tokenizer=tokenizer,
                    max_tokens=max_tokens,
                    on_long=on_long,
                )
                _check_row(encoded.documents, row_tokens)
            except ExampleFault as fault:
                report.drop(fault, on_bad)
                continue
            report.kept += 1
            report.truncated += encoded.truncated
            copies = math.floor((index + 1) * weight) - math.floor(index * weight)
            builder.add(encoded.documents, number, copies)
    if not builder.order:
        raise DataError(f"{', '.join(report.names)}: nothing left: {report.faults() or 'the weights take no example'}")
    documents = builder.build()
    report.measure(documents)
    return Dataset(documents, report, documents.fingerprint(), report.names, tuple(sources))


def _weighted(paths) -> list[tuple[str, float]]:
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    weighted = [(p, 1.0) if isinstance(p, str | os.PathLike) else (p[0], float(p[1])) for p in paths]
    for path, weight in weighted:
        if not (weight > 0 and math.isfinite(weight)):
            raise DataError(f"{path}: the weight of a file must be above 0, found {weight}")
    if not weighted:
        raise DataError("data.train: no files given")
    return weighted


def _examples(source: Source, format: str, kind: str, report: "Report", on_bad: str):
    """(index, Example) of all records without a fault; the others go to the report."""
    found = None
    for index in range(len(source)):
        record, origin = source[index]
        this = detect(record, origin) if format == "auto" else format
        if found is None:
            found = this
            _check_kind(source, found, kind)
            report.formats.append(found)
        elif this != found:
            raise DataError(f"{origin}: the record has the keys of format {this}, but the file began with {found}")
        try:
            example = parse(record, origin, found, kind)
        except ExampleFault as fault:
            report.read += 1
            report.drop(fault, on_bad)
            continue
        yield index, example


def _check_kind(source: Source, format: str, kind: str) -> None:
    if format in FORMATS and not FORMATS[format].fits(kind):
        fitting = ", ".join(f.name for f in FORMATS.values() if f.fits(kind))
        raise DataError(
            f"{source.path}: found the format {format}, which holds {FORMATS[format].kind} data; "
            f"{kind} training takes {fitting}"
        )


def _check_row(documents: list[Document], row_tokens: int | None) -> None:
    for document in documents:
        if row_tokens is not None and document.cost > row_tokens:
            detail = f"takes {document.cost} tokens, but a row holds {row_tokens} (batch.tokens_per_row)"
            raise ExampleFault("longer_than_row", detail, document.origin)


class Documents(Sequence):
    """Documents in a few flat arrays (8 bytes a token), each built when asked for; its arrays are views."""

    def __init__(self, names, tokens, weights, part_starts, first_parts, example_ids, sources, lines, order, values):
        self._names, self._tokens, self._weights = names, tokens, weights
        self._part_starts = part_starts  # of prompts and completions, one after another; one more than there are
        self._first_parts = first_parts  # part that is each document's prompt; one more than there are
        self._example_ids, self._sources, self._lines = example_ids, sources, lines
        self._values = values  # {name: one for each part}, 0 at prompts
        self._order = order  # document at each index: a weight above 1 repeats some

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Document:
        d = self._order[index]
        starts = self._part_starts[self._first_parts[d] : self._first_parts[d + 1] + 1]
        parts = [slice(start, end) for start, end in itertools.pairwise(starts)]
        return Document(
            prompt=self._tokens[parts[0]],
            completions=tuple(self._tokens[part] for part in parts[1:]),
            weights=tuple(self._weights[part] for part in parts[1:]),
            example_id=int(self._example_ids[d]),
            origin=Origin(self._names[self._sources[d]], int(self._lines[d])),
            completion={
                name: tuple(values[self._first_parts[d] + 1 : self._first_parts[d + 1]].tolist())
                for name, values in self._values.items()
            },
        )

    @property
    def costs(self) -> np.ndarray:
        """`Document.cost` of each, int64[len], without building any."""
        prompts = self._first_parts[:-1]
        sizes = np.diff(self._part_starts[self._first_parts])
        completions = np.diff(self._first_parts) - 1
        linear = self._part_starts[prompts + 1] == self._part_starts[prompts]
        return np.where(linear, sizes, sizes - 1 + completions)[self._order]

    def fingerprint(self) -> str:
        """sha256 of all documents in order: tokens, weights, boundaries, example ids and values of completions."""
        digest = hashlib.sha256()
        arrays = (self._tokens, self._weights, self._part_starts, self._first_parts, self._example_ids, self._order)
        for array in (*arrays, *self._values.values()):
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def example_ids(self) -> np.ndarray:
        """`Document.example_id` of each, int[len]."""
        return self._example_ids[self._order]

    @property
    def trained(self) -> int:
        """Tokens with a weight, repetitions counted."""
        ends = np.concatenate([[0], np.cumsum(self._weights > 0)])[self._part_starts[self._first_parts]]
        return int(np.diff(ends)[self._order].sum())


class _Builder:
    def __init__(self, names: tuple[str, ...]):
        self.names, self.order = names, []
        self._tokens, self._weights, self._part_sizes = [], [], []
        self._first_parts, self._example_ids, self._sources, self._lines = [0], [], [], []
        self._values = {}

    def add(self, documents: list[Document], source: int, copies: int) -> None:
        for document in documents if copies else ():
            self.order += [len(self._example_ids)] * copies
            parts = (document.prompt, *document.completions)
            self._tokens += parts
            self._weights += (np.zeros(len(document.prompt), np.float32), *document.weights)
            self._part_sizes += map(len, parts)
            for name, values in document.completion.items():
                self._values.setdefault(name, []).extend((0.0, *values))
            self._first_parts.append(self._first_parts[-1] + len(parts))
            self._example_ids.append(document.example_id)
            self._sources.append(source)
            self._lines.append(document.origin.line)

    def build(self) -> Documents:
        return Documents(
            self.names,
            np.concatenate(self._tokens),
            np.concatenate(self._weights),
            np.concatenate([[0], np.cumsum(self._part_sizes)]),
            np.array(self._first_parts),
            np.array(self._example_ids),
            np.array(self._sources),
            np.array(self._lines),
            np.array(self.order),
            {name: np.array(values, np.float32) for name, values in self._values.items()},
        )


@dataclasses.dataclass
class Report:
    """What became of the examples; `str(report)` is a few lines of text.

    read = kept + all of `dropped`. documents counts repetitions by weight and the pieces of long texts; tokens and
    trained_tokens are of these, shared prompts once. dropped: {reason: count}, origins: {reason: the first three}.
    percentiles: {50, 90, 99, 100: tokens of a document in a row}.
    """

    names: tuple[str, ...]
    formats: list[str] = dataclasses.field(default_factory=list)
    read: int = 0
    kept: int = 0
    documents: int = 0
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    percentiles: dict[int, int] = dataclasses.field(default_factory=dict)
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    origins: dict[str, list[ExampleFault]] = dataclasses.field(default_factory=dict)

    def drop(self, fault: ExampleFault, on_bad: str) -> None:
        """Counts the fault, or raises it where on_bad is "error" (being too long is no fault of that kind)."""
        if on_bad == "error" and fault.reason not in LENGTH_REASONS:
            raise fault
        self.dropped[fault.reason] += 1
        if self.dropped[fault.reason] <= ORIGINS_SHOWN:
            self.origins.setdefault(fault.reason, []).append(fault)

    def measure(self, documents: Documents) -> None:
        costs = documents.costs
        self.documents, self.tokens, self.trained_tokens = len(documents), int(costs.sum()), documents.trained
        self.percentiles = {p: int(np.percentile(costs, p, method="higher")) for p in PERCENTILES}

    def faults(self) -> str:
        """One line: the counts by reason, and where the first of the commonest is."""
        if not self.dropped:
            return ""
        counts = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
        return f"{self.dropped.total()} of {self.read} examples dropped ({counts}); first: {self._first()}"

    def _first(self) -> str:
        return str(self.origins[self.dropped.most_common(1)[0][0]][0])

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) pairs for a table."""
        files = [("file", f"{name} ({form})") for name, form in zip(self.names, self.formats, strict=True)]
        lengths = ", ".join(f"{'max' if p == 100 else f'{p} %'} {n:,}" for p, n in self.percentiles.items())
        rows = [*files, ("examples read", f"{self.read:,}"), ("examples kept", f"{self.kept:,}")]
        for reason, count in self.dropped.most_common():
            where = ", ".join(str(fault.origin).rpartition("/")[2] for fault in self.origins[reason])
            rows.append((f"dropped: {reason}", f"{count:,} ({where}{', ...' if count > ORIGINS_SHOWN else ''})"))
        rows += [("truncated", f"{self.truncated:,}")] if self.truncated else []
        trained = f"{self.tokens:,}, of which {100 * self.trained_tokens / max(self.tokens, 1):.1f} % trained"
        return [*rows, ("documents", f"{self.documents:,}"), ("tokens", trained), ("tokens a document", lengths)]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def table(self) -> rich.table.Table:
        """The same as a rich table, for the console."""
        table = rich.table.Table("data", "", show_header=False)
        for row in self.rows():
            table.add_row(*row)
        return table
