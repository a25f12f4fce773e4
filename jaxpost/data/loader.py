"""The order of a run's data: which documents share a row and which rows a step, for any number of hosts and devices."""

import bisect
import functools
import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from jaxpost.data.rows import build_batch, pack, take_rows
from jaxpost.errors import DataError
from jaxpost.types import Batch, Document

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # steps built ahead of the device, in threads


class Place(NamedTuple):
    """Where a step begins in the data. With the seed it is all that needs saving."""

    epoch: int
    window: int  # of the epoch
    row: int  # of the window


class EndOfData(IndexError):
    """A step beyond the last epoch was asked for. A class of its own, as documents may raise IndexError too."""


class Loader:
    """A stream of packed rows over epochs; step s (0-based) covers the next `rows_per_step` of them.

    An epoch is a seeded permutation of the entries, cut into windows: an entry is a document, or what
    `documents.members` says (data/documents.py). The documents of a window are packed by best fit, and its rows
    shuffled, so that full rows and short ones mix. Every document occurs once an epoch: empty rows (weight 0) fill the
    epoch's last step. Any step can be asked for at any time, and depends on the arguments alone.

    Windows are planned when first needed, in order: the first batch waits for the costs of one window, and step s for
    those of the windows before it, since how many rows they make decides where it begins. What is kept is the number of
    rows of each window (`plan`); with it, another loader of the same arguments goes on from any step of it without
    the windows before. Methods may be called from several threads.

    Args:
      documents: any sequence; `documents[i]` may be computed when asked for, if that is safe in threads.
      rows_per_step: rows of a step on all hosts together (B).
      tokens_per_row: T.
      documents_per_row: most documents in a row (M).
      branches: most completions of a document (N), 0 for linear documents.
      seed: of the order; at least 0.
      shuffle: False keeps the documents' order from window to window and the packed order of rows within one.
      epochs: passes over the data, after which the steps end; None goes on for ever.
      window: entries packed together.
      plan: `plan()` of a loader of the same arguments.

    Raises:
      DataError: no documents, or one that is longer than a row (raised when its window is planned).
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        rows_per_step: int,
        tokens_per_row: int,
        documents_per_row: int,
        branches: int,
        seed: int,
        shuffle: bool = True,
        epochs: int | None = None,
        window: int = 4096,
        plan: list[list[int]] | None = None,
    ):
        if len(documents) == 0:
            raise DataError("the data holds no documents")
        self.documents = documents
        self._grouped = documents if hasattr(documents, "members") else _Plain(documents)
        self.rows_per_step = rows_per_step
        self.tokens_per_row = tokens_per_row
        self.documents_per_row = documents_per_row
        self.branches = branches
        self.epochs = epochs
        self._seed = seed
        self._shuffle = shuffle
        self._window = window
        self._windows = -(-self._grouped.entries // window)  # of an epoch
        self._lock = threading.Lock()  # over the two lists below, which only grow
        self._first_rows = [list(rows) for rows in plan or ()]  # [epoch][window]: rows before it; one more than planned
        self._first_steps = [0]  # [epoch]: steps before it, for the epochs that are fully planned and the next one
        self._order = functools.lru_cache(maxsize=2)(self._make_order)
        self._made = functools.lru_cache(maxsize=8)(self._make_window)
        self._taken = functools.lru_cache(maxsize=4)(self._count_taken)

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows that hold documents in this epoch (0-based): without those that fill its last step. Plans all of it."""
        with self._lock:
            return self._plan_rows(epoch, sys.maxsize)

    def steps_in_epoch(self, epoch: int) -> int:
        """Steps of this epoch (0-based). Plans all of it."""
        return -(-self.rows_in_epoch(epoch) // self.rows_per_step)

    def total_steps(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs. Plans all of them."""
        with self._lock:
            self._plan_epochs(epochs - 1)
            return self._first_steps[epochs]

    def plan(self) -> list[list[int]]:
        """[epoch][window]: rows of the epoch before each window that is planned, and behind the last of them."""
        with self._lock:
            return [list(rows) for rows in self._first_rows]

    def epochs_done(self, step: int) -> dict[str, float]:
        """How often the first `step + 1` steps have passed over the data: "" of it all, and by name of each source.

        A source that is taken twice an epoch is passed over twice. Whole windows are counted; of the one at hand, the
        same share of each source as of its rows.
        """
        epoch, first_row = self._locate(step)
        first_rows = self._first_rows[epoch]
        row = min(first_row + self.rows_per_step, first_rows[-1])
        window = min(bisect.bisect_right(first_rows, row), len(first_rows) - 1) - 1
        share = (row - first_rows[window]) / max(first_rows[window + 1] - first_rows[window], 1)
        before, now = self._taken(epoch, window)
        taken = before + share * now
        done = {"": epoch + float(taken.sum()) / self._grouped.entries}
        if mixture := getattr(self.documents, "mixture", None):
            whole = self._taken(epoch, self._windows)[0] if epoch else 0
            passes = (epoch * whole + taken) / np.maximum(mixture.sizes, 1)
            done |= dict(zip(mixture.names, passes.tolist(), strict=True))
        return done

    def window_rows(self, epoch: int, window: int) -> list[list[int]]:
        """The window's rows in order, each a list of indices into `documents`."""
        return self._made(epoch, window)[0]

    def place(self, step: int) -> Place:
        """Where the step's first row lies. Raises EndOfData beyond the last epoch."""
        epoch, first_row = self._locate(step)
        return self._place_of_row(epoch, first_row)

    def rows_documents(self, step: int) -> list[list[int]]:
        """Indices into `documents`, for each of the step's rows in order. Raises EndOfData beyond the last epoch."""
        return self._of_step(step, 0)

    def tokens(self, step: int) -> int:
        """Tokens of the step's rows, on all hosts together. Raises EndOfData beyond the last epoch."""
        return sum(self._of_step(step, 1))

    def batch(self, step: int, host_rows: slice = slice(None)) -> Batch:
        """The step's batch (numpy), or these of its rows: what this host's devices hold.

        Raises EndOfData beyond the last epoch.
        """
        rows = self.rows_documents(step)
        if not rows[host_rows]:  # no documents to tell which values a batch carries: other hosts' rows do
            return take_rows(self._build(rows, self.rows_per_step), host_rows)
        return self._build(rows[host_rows], len(range(self.rows_per_step)[host_rows]))

    def iterate(self, start_step: int = 0, host_rows: slice = slice(None)) -> "Batches":
        """The batches from a step on, built ahead in threads. Close it, or use it in a `with` statement."""
        return Batches(self, start_step, host_rows)

    def _build(self, rows: list[list[int]], rows_per_step: int) -> Batch:
        return build_batch(
            [[self.documents[i] for i in row] for row in rows],
            rows_per_step=rows_per_step,
            tokens_per_row=self.tokens_per_row,
            documents_per_row=self.documents_per_row,
            branches=self.branches,
        )

    def _of_step(self, step: int, part: int) -> list:
        """Of each of the step's rows in order, what `_make_window` returns as this part."""
        epoch, first_row = self._locate(step)
        _, window, row = self._place_of_row(epoch, first_row)
        ahead = (self._made(epoch, w)[part] for w in range(window, self._windows))
        return list(itertools.islice(itertools.chain.from_iterable(ahead), row, row + self.rows_per_step))

    def _locate(self, step: int) -> tuple[int, int]:
        """(epoch, row of that epoch) at which a step begins; all windows that the step needs are planned."""
        if step < 0:
            raise IndexError(f"step {step}: steps are counted from 0")
        if found := self._planned(step):
            return found
        with self._lock:
            while step >= self._first_steps[-1]:  # in the newest epoch, or beyond
                epoch = len(self._first_steps) - 1
                if epoch == self.epochs:
                    raise EndOfData(f"step {step} is beyond the {self._first_steps[-1]} of {epoch} epochs")
                first_row = (step - self._first_steps[-1]) * self.rows_per_step
                if self._plan_rows(epoch, first_row + self.rows_per_step) > first_row:
                    return epoch, first_row
                self._plan_epochs(epoch)
            epoch = bisect.bisect_right(self._first_steps, step) - 1
            return epoch, (step - self._first_steps[epoch]) * self.rows_per_step

    def _planned(self, step: int) -> tuple[int, int] | None:
        """`_locate` of a step whose windows are planned. Without the lock: who plans a window may hold it for long."""
        first_steps = self._first_steps
        epoch = bisect.bisect_right(first_steps, step) - 1
        first_row = (step - first_steps[epoch]) * self.rows_per_step
        if epoch == len(first_steps) - 1:  # not fully planned
            planned = self._first_rows[epoch][-1] if epoch < len(self._first_rows) else 0
            if planned < first_row + self.rows_per_step:
                return None
        return epoch, first_row

    def _place_of_row(self, epoch: int, row: int) -> Place:
        first_rows = self._first_rows[epoch]
        window = bisect.bisect_right(first_rows, row) - 1
        return Place(epoch, window, row - first_rows[window])

    def _plan_epochs(self, epoch: int) -> None:
        """Plans everything up to the end of this epoch. Needs the lock."""
        while len(self._first_steps) <= epoch + 1:
            rows = self._plan_rows(len(self._first_steps) - 1, sys.maxsize)
            if rows == 0:
                raise DataError("the data holds no documents: every example was dropped")
            self._first_steps.append(self._first_steps[-1] + -(-rows // self.rows_per_step))

    def _plan_rows(self, epoch: int, rows: int) -> int:
        """Plans windows of an epoch until they make this many rows, or end. Returns the rows so far. Needs the lock."""
        while len(self._first_rows) <= epoch:
            self._first_rows.append([0])
        first_rows = self._first_rows[epoch]
        while first_rows[-1] < rows and len(first_rows) <= self._windows:
            first_rows.append(first_rows[-1] + len(self.window_rows(epoch, len(first_rows) - 1)))
        return first_rows[-1]

    def _make_order(self, epoch: int) -> np.ndarray:
        """The epoch's entries in order, int64[entries]."""
        count = self._grouped.entries
        return random_order(count, self._seed, epoch) if self._shuffle else np.arange(count)

    def _window_entries(self, epoch: int, window: int) -> np.ndarray:
        return self._order(epoch)[window * self._window : (window + 1) * self._window]

    def _make_window(self, epoch: int, window: int) -> tuple[list[list[int]], list[int]]:
        """Of the window's rows in order: (indices into `documents`, tokens)."""
        members, costs = self._grouped.members(self._window_entries(epoch, window))
        if window + 1 < self._windows and hasattr(self.documents, "prepare"):
            self.documents.prepare(self._window_entries(epoch, window + 1))
        if len(costs) and costs.max() > self.tokens_per_row:
            longest = int(costs.argmax())
            raise DataError(
                f"{self.documents[int(members[longest])].origin}: the example takes {costs[longest]} tokens, "
                f"but a row holds {self.tokens_per_row} (batch.tokens_per_row)"
            )
        rows = pack(costs, self.tokens_per_row, self.documents_per_row)
        if self._shuffle:
            rows = [rows[i] for i in random_order(len(rows), self._seed, epoch, 1 + window)]
        return [members[row].tolist() for row in rows], [int(costs[row].sum()) for row in rows]

    def _count_taken(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(entries of each source in the windows before this one, in this one), int64[sources]."""
        mixture = getattr(self.documents, "mixture", None)

        def count(entries: np.ndarray) -> np.ndarray:
            if mixture is None:
                return np.array([len(entries)])
            return np.bincount(mixture.sources(entries), minlength=len(mixture.names))

        return count(self._order(epoch)[: window * self._window]), count(self._window_entries(epoch, window))


def random_order(count: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """A permutation of `count`. Made of raw bits, which numpy never changes; the methods of Generator it may."""
    bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream])
    return np.argsort(bits.random_raw(count), kind="stable")


class _Plain:
    """Any sequence of documents as one whose entries are its documents."""

    def __init__(self, documents: Sequence[Document]):
        self._documents = documents
        self.entries = len(documents)
        self._costs = np.full(self.entries, -1)  # those not yet asked for

    def members(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        unknown = entries[self._costs[entries] < 0]
        self._costs[unknown] = [self._documents[i].cost for i in unknown.tolist()]
        return entries, self._costs[entries]


class _Steps:
    """What grain reads: the batches from a step on, None after the last one."""

    def __init__(self, loader: Loader, start_step: int, host_rows: slice):
        self._loader, self._start_step, self._host_rows = loader, start_step, host_rows

    def __len__(self) -> int:
        return sys.maxsize  # the true number would need a plan of all epochs before the first batch

    def __getitem__(self, index: int) -> Batch | None:
        try:
            return self._loader.batch(self._start_step + index, self._host_rows)
        except EndOfData:
            return None


class Batches(Iterator[Batch]):
    """The iterator that `Loader.iterate` returns."""

    def __init__(self, loader: Loader, start_step: int, host_rows: slice):
        source = grain.MapDataset.source(_Steps(loader, start_step, host_rows))
        self._iterator = iter(source.to_iter_dataset(READ, allow_nones=True))
        self._closed = False

    def __next__(self) -> Batch:
        batch = None if self._closed else next(self._iterator)
        if batch is None:
            self.close()
            raise StopIteration
        return batch

    def close(self) -> None:
        """Stops the threads; may be called twice."""
        self._closed = True
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def row_statistics(loader: Loader) -> dict[str, float]:
    """What packing and prompt sharing make of the first window, for the table at the start of a run.

    Returns:
      documents, tokens (counts); documents_per_row (mean over rows); padding_share (of the places of these rows);
      prompt_share_saved: how many tokens a row for each completion with its own copy of the prompt would add,
      (N - 1) * (P - 1) a document, as a share of all the tokens it would then be.
    """
    rows = loader.window_rows(0, 0)
    documents = [loader.documents[index] for row in rows for index in row]
    tokens = sum(document.cost for document in documents)
    saved = sum((len(d.completions) - 1) * (len(d.prompt) - 1) for d in documents if not d.linear)
    return {
        "documents": len(documents),
        "tokens": tokens,
        "documents_per_row": len(documents) / max(len(rows), 1),
        "padding_share": 1 - tokens / max(len(rows) * loader.tokens_per_row, 1),
        "prompt_share_saved": saved / max(tokens + saved, 1),
    }
