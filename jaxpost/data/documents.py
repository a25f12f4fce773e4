"""Sequences of documents that a loader orders by example: all tokenised ahead, or each window when it is its turn.

Both are indexed by number and by `members(entries)`: the documents of some entries of the mixture (examples in their
repetitions; most have one document, long texts several, dropped examples none). The order of an epoch is over entries,
which are known before anything is tokenised, so both kinds give the same batches.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxpost.data.chunks import Chunk
from jaxpost.data.mixture import Mixture
from jaxpost.errors import ConfigError
from jaxpost.types import Document

PIECES = 1 << 20  # more documents than any example has: entry * PIECES + piece numbers the documents of a lazy sequence
LIVE_WINDOWS = 16  # kept in memory by a lazy sequence


class Documents(Sequence):
    """Documents that are tokenised; each is built when asked for.

    ids: the example ids of the chunks' records, ascending; None where these are all examples in order.
    """

    def __init__(self, chunks: Sequence[Chunk], mixture: Mixture, ids: np.ndarray | None = None):
        self.mixture = mixture
        self._chunks, self._ids = list(chunks), ids
        per_record = _joined([np.diff(chunk.first_documents.astype(np.int64)) for chunk in self._chunks])
        self._record_starts = np.cumsum(np.concatenate([[0], per_record]))  # documents before each record
        self._chunk_starts = np.cumsum([0, *(len(chunk.lines) for chunk in self._chunks)])
        records = mixture.entries if ids is None else np.searchsorted(ids, mixture.entries)
        counts = per_record[records]
        self._entry_starts = np.cumsum(np.concatenate([[0], counts]))
        first = self._record_starts[records] - self._entry_starts[:-1]
        self._order = np.repeat(first, counts) + np.arange(counts.sum())  # document at each index
        self._example_of = mixture.entries

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Document:
        index = range(len(self))[index]  # IndexError beyond the end; counts from the end where negative
        document = self._order[index]
        chunk = int(np.searchsorted(self._chunk_starts, document, side="right")) - 1
        entry = int(np.searchsorted(self._entry_starts, index, side="right")) - 1
        return self._chunks[chunk].document(int(document - self._chunk_starts[chunk]), int(self._example_of[entry]))

    @property
    def entries(self) -> int:
        return len(self._example_of)

    def members(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices, costs) of the documents of these entries, in their order."""
        starts, counts = self._entry_starts[entries], np.diff(self._entry_starts)[entries]
        indices = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        return indices, self.costs[indices]

    @functools.cached_property
    def costs(self) -> np.ndarray:
        """`Document.cost` of each, int64[len]."""
        return _joined([chunk.costs for chunk in self._chunks])[self._order]

    @property
    def example_ids(self) -> np.ndarray:
        """`Document.example_id` of each, int64[len]."""
        return np.repeat(self._example_of, np.diff(self._entry_starts))

    @property
    def most_completions(self) -> int:
        """Of any document; 0 where there are none."""
        counts = _joined([np.diff(chunk.first_parts.astype(np.int64)) - 1 for chunk in self._chunks])
        return int(counts[self._order].max(initial=0))

    @property
    def trained(self) -> int:
        """Tokens with a weight, repetitions counted."""
        return int(_joined([chunk.trained for chunk in self._chunks])[self._order].sum())

    def fingerprint(self) -> str:
        """sha256 of all documents in order: tokens, weights, boundaries and example ids."""
        digest = hashlib.sha256(self.example_ids.astype("<i8").tobytes())
        for chunk in self._chunks:
            digest.update(chunk.digest)
        return digest.hexdigest()

    def sample(self, count: int) -> list[Document]:
        """At most `count` of the documents, at even distances."""
        return [self[index] for index in _even(len(self), count)]

    def hold_out(self, count: int, seed: int) -> tuple["Documents", "Documents"]:
        """(the rest, `count` examples drawn by the seed): all pieces of an example go the same way.

        Raises ConfigError where that leaves nothing to train on.
        """
        kept = np.unique(self._example_of[np.diff(self._entry_starts) > 0])
        if count >= len(kept):
            raise _too_few(count, len(kept))
        order = _draw(self.mixture, seed)
        drawn = np.sort(order[np.isin(order, kept)][:count])
        held = dataclasses.replace(self.mixture, entries=drawn)
        return tuple(Documents(self._chunks, part, self._ids) for part in (self.mixture.without(drawn), held))


class LazyDocuments:
    """Documents that are tokenised by windows of the loader's order, the next window in the background.

    encode: sorted distinct example ids -> their chunks, in that order; it is called from one thread at a time.
    close: ends what `encode` runs in. len() is the number of entries: how many documents they make shows as they come.
    """

    def __init__(
        self,
        mixture: Mixture,
        encode: Callable[[np.ndarray], list[Chunk]],
        close: Callable[[], None],
        thread: concurrent.futures.Executor | None = None,
    ):
        self.mixture = mixture
        self._encode, self._close = encode, close
        self._thread = thread or concurrent.futures.ThreadPoolExecutor(1, "tokenise ahead")
        self._lock = threading.Lock()  # over the two below
        self._windows: collections.OrderedDict[bytes, concurrent.futures.Future] = collections.OrderedDict()
        self._place_of: dict[int, tuple[bytes, int]] = {}  # entry -> (window, place in it), of the live ones

    def __len__(self) -> int:
        return len(self.mixture.entries)

    @property
    def entries(self) -> int:
        return len(self)

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, len(self), 1024):
            yield from self._documents(self.mixture.entries[start : start + 1024])

    def __getitem__(self, index: int) -> Document:
        entry, piece = divmod(index, PIECES)
        with self._lock:
            name, place = self._place_of.get(entry, (None, 0))
            future = self._windows.get(name)
        window = future.result() if future else self._documents(self.mixture.entries[entry : entry + 1])
        first, end = window._entry_starts[place : place + 2]
        return window[range(first, end)[piece]]

    def prepare(self, entries: np.ndarray) -> None:
        """Begins to tokenise these entries, which `members` will be asked for next."""
        self._window(entries)

    def members(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices, costs) of the documents of these entries, in their order."""
        window = self._window(entries).result()
        counts = np.diff(window._entry_starts)
        pieces = np.arange(len(window)) - np.repeat(window._entry_starts[:-1], counts)
        return np.repeat(entries * PIECES, counts) + pieces, window.costs

    def _window(self, entries: np.ndarray) -> concurrent.futures.Future:
        name = hashlib.sha256(entries.tobytes()).digest()
        with self._lock:
            if name not in self._windows:
                self._windows[name] = self._thread.submit(self._make, self.mixture.entries[entries])
                self._place_of |= {entry: (name, place) for place, entry in enumerate(entries.tolist())}
                if len(self._windows) > LIVE_WINDOWS:
                    gone, _ = self._windows.popitem(last=False)
                    self._place_of = {e: at for e, at in self._place_of.items() if at[0] != gone}
            return self._windows[name]

    def _documents(self, example_ids: np.ndarray) -> Documents:
        return self._thread.submit(self._make, example_ids).result()

    def _make(self, example_ids: np.ndarray) -> Documents:
        ids = np.unique(example_ids)
        return Documents(self._encode(ids), dataclasses.replace(self.mixture, entries=example_ids), ids)

    def sample(self, count: int) -> list[Document]:
        """The first documents of at most `count` examples at even distances; dropped ones give none."""
        return list(self._documents(self.mixture.entries[_even(len(self), count)]))

    def hold_out(self, count: int, seed: int) -> tuple["LazyDocuments", Documents]:
        """As `Documents.hold_out`, the same examples; only those that are drawn are tokenised."""
        order, drawn = _draw(self.mixture, seed), np.zeros(0, np.int64)
        for start in range(0, len(order), max(count, 64)):
            part = order[start : start + max(count, 64)]
            made = self._documents(part)
            drawn = np.concatenate([drawn, part[np.diff(made._entry_starts) > 0]])
            if len(drawn) > count:  # one more than needed, so that something is left to train on
                held = self._documents(np.sort(drawn[:count]))
                rest = self.mixture.without(drawn[:count])
                return LazyDocuments(rest, self._encode, self._close, self._thread), held
        raise _too_few(count, len(drawn))

    def close(self) -> None:
        """Ends the background work. It begins again where more is asked for."""
        with self._lock:
            for future in self._windows.values():
                future.cancel()
            self._windows.clear()
            self._place_of.clear()
        self._thread.submit(self._close).result()


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _even(length: int, count: int) -> np.ndarray:
    return np.arange(length) if count >= length else np.linspace(0, length - 1, count).astype(np.int64)


def _draw(mixture: Mixture, seed: int) -> np.ndarray:
    """The examples of a mixture, dropped ones too, in the order in which they are held out."""
    return np.random.default_rng(seed).permutation(np.unique(mixture.entries))


def _too_few(count: int, examples: int) -> ConfigError:
    return ConfigError(f"data.eval_examples: {count} of {examples} examples leave none to train on; give fewer")
