"""The report of a dataset: what became of its examples."""

import collections
import dataclasses

import numpy as np
import rich.table
import rich.text

from jaxpost.data import quality
from jaxpost.data.chunks import Chunk
from jaxpost.data.documents import Documents
from jaxpost.data.formats import ExampleFault

ORIGINS_SHOWN = 3
LENGTH_REASONS = ("too_long", "longer_than_row")
NO_FAULTS = (*LENGTH_REASONS, *quality.REASONS)  # what settings leave out: dropped under data.on_bad="error" too
PERCENTILES = (50, 90, 99, 100)


@dataclasses.dataclass
class Report:
    """What became of the examples; `str(report)` is a few lines of text.

    read = kept + all of `dropped`. documents counts repetitions by weight and the pieces of long texts; tokens and
    trained_tokens are of these, shared prompts once. dropped: {reason: count}, origins: {reason: the first three}.
    percentiles: {50, 90, 99, 100: tokens of a document in a row}. lazy: the counts are of what was read so far.
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
    lazy: bool = False

    def drop(self, fault: ExampleFault, on_bad: str) -> None:
        """Counts the fault, or raises it where on_bad is "error" (what settings leave out is none of that kind)."""
        if on_bad == "error" and fault.reason not in NO_FAULTS:
            raise fault
        self.dropped[fault.reason] += 1
        if self.dropped[fault.reason] <= ORIGINS_SHOWN:
            self.origins.setdefault(fault.reason, []).append(fault)

    def add(self, chunk: Chunk, on_bad: str, new: np.ndarray | None = None) -> None:
        """Counts the records of a chunk, or the new ones among them (bool[R])."""
        new = np.ones(len(chunk.truncated), bool) if new is None else new
        for fault in chunk.faults:
            if new[fault.position]:
                self.drop(fault.error(), on_bad)
        self.read += int(new.sum())
        self.kept += int((np.diff(chunk.first_documents.astype(np.int64)) > 0)[new].sum())
        self.truncated += int(chunk.truncated[new].sum())

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
        read = "examples read so far" if self.lazy else "examples read"
        rows = [*files, (read, f"{self.read:,}"), ("examples kept", f"{self.kept:,}")]
        for reason, count in self.dropped.most_common():
            where = ", ".join(str(fault.origin).rpartition("/")[2] for fault in self.origins[reason])
            rows.append((f"dropped: {reason}", f"{count:,} ({where}{', ...' if count > ORIGINS_SHOWN else ''})"))
        rows += [("truncated", f"{self.truncated:,}")] if self.truncated else []
        if self.lazy:  # the rest is known when all is read
            return rows
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
            table.add_row(*map(rich.text.Text, row))  # not markup: a file's name may hold [brackets]
        return table
