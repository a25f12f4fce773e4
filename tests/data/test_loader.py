"""The order of the data: each document once an epoch, any step from any start, the same for every host."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.data.loader import Loader, row_statistics
from jaxpost.data.mixture import mix
from jaxpost.data.rows import pack
from jaxpost.errors import DataError
from tests.data.test_rows import assert_same, branching, linear


class Documents:
    """Linear documents of given costs, made when asked for; remembers which were."""

    def __init__(self, costs):
        self.costs, self.asked = list(costs), []

    def __len__(self):
        return len(self.costs)

    def __getitem__(self, index):
        self.asked.append(index)
        return linear([index + 1] * self.costs[index], index)


class Grouped(Documents):
    """Entries of so many documents each, whose costs are known."""

    def __init__(self, costs, sizes):
        super().__init__(costs)
        self.groups = np.split(np.arange(len(costs)), np.cumsum(sizes)[:-1])
        self.entries = len(sizes)

    def __len__(self):
        return self.entries

    def members(self, entries):
        indices = np.concatenate([self.groups[entry] for entry in entries])
        return indices, np.array(self.costs, int)[indices]


def make_loader(documents=None, **changes):
    if documents is None:
        documents = Documents(np.random.default_rng(3).integers(1, 17, 150))
    shape = {"rows_per_step": 4, "tokens_per_row": 24, "documents_per_row": 5, "branches": 0}
    return Loader(documents, **(shape | {"seed": 7, "window": 32} | changes))


def epoch_steps(loader, epoch):
    first = loader.total_steps(epoch)
    return range(first, first + loader.steps_in_epoch(epoch))


def documents_of_epoch(loader, epoch):
    rows = [row for step in epoch_steps(loader, epoch) for row in loader.rows_documents(step)]
    return [index for row in rows for index in row]


def philox(count, key, stream):
    """Philox4x64-10 (Salmon et al. 2011), counting from (1, 0, 0, stream): `count` numbers of 64 bits."""
    low, numbers = 2**64 - 1, []
    for block in range(1, count // 4 + 2):
        (k0, k1), (x0, x1, x2, x3) = key, (block, 0, 0, stream)
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
            x0, x1, x2, x3 = (b >> 64) ^ x1 ^ k0, b & low, (a >> 64) ^ x3 ^ k1, a & low
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & low, (k1 + 0xBB67AE8584CAA73B) & low
        numbers += [x0, x1, x2, x3]
    return np.array(numbers[:count], np.uint64)


def test_tokens_of_a_step_are_those_of_its_batch():
    loader = make_loader(epochs=2)
    for step in range(loader.total_steps(2)):
        assert loader.tokens(step) == (loader.batch(step).rows.segments > 0).sum()


class TestOrder:
    @given(
        costs=st.lists(st.integers(1, 9), min_size=1, max_size=40),
        rows_per_step=st.integers(1, 5),
        documents_per_row=st.integers(1, 4),
        window=st.integers(1, 50),
        shuffle=st.booleans(),
    )
    @settings(deadline=None, max_examples=50)
    def test_every_document_once_an_epoch(self, costs, rows_per_step, documents_per_row, window, shuffle):
        loader = make_loader(
            Documents(costs),
            rows_per_step=rows_per_step,
            tokens_per_row=9,
            documents_per_row=documents_per_row,
            window=window,
            shuffle=shuffle,
        )
        for epoch in range(3):
            seen = []
            for step in epoch_steps(loader, epoch):
                batch = loader.batch(step)
                assert batch.rows.tokens.shape == (rows_per_step, 9)
                seen += batch.example_ids[batch.example_ids >= 0].tolist()
                counted = np.bincount(batch.rows.tokens.ravel(), minlength=len(costs) + 1)[1:]
                present = set(batch.example_ids.ravel().tolist()) - {-1}
                assert counted.tolist() == [cost if i in present else 0 for i, cost in enumerate(costs)]
            assert sorted(seen) == list(range(len(costs)))

    def test_a_step_covers_the_next_rows(self):
        """Against a loop that packs window after window and cuts the rows into steps."""
        loader = make_loader(shuffle=False)
        costs, rows = loader.documents.costs, []
        for start in range(0, 150, 32):
            rows += [[start + i for i in row] for row in pack(costs[start : start + 32], 24, 5)]
        for step in epoch_steps(loader, 0):
            assert loader.rows_documents(step) == rows[4 * step : 4 * step + 4]
        assert len(rows) == loader.rows_in_epoch(0)

    def test_windows_hold_their_documents(self):
        loader = make_loader(shuffle=False)
        for step in epoch_steps(loader, 0):
            place = loader.place(step)
            assert place.epoch == 0
            assert min(loader.rows_documents(step)[0]) // 32 == place.window

    def test_epochs_and_seeds_differ(self):
        loader = make_loader()
        orders = [documents_of_epoch(loader, 0), documents_of_epoch(loader, 1)]
        orders.append(documents_of_epoch(make_loader(seed=8), 0))
        orders.append(documents_of_epoch(make_loader(shuffle=False), 0))
        assert all(sorted(order) == list(range(150)) for order in orders)
        assert len({tuple(order) for order in orders}) == 4

    def test_full_and_short_rows_mix(self):
        """Best fit leaves its short rows to the end of a window; a step would see only these."""
        short = lambda loader: [len(loader.rows_documents(s)[0]) for s in epoch_steps(loader, 0)]  # noqa: E731
        documents = Documents([20] * 200 + [2] * 300)
        packed, mixed = (make_loader(documents, window=500, shuffle=shuffle) for shuffle in (False, True))
        assert short(packed) == sorted(short(packed)) or short(packed) == sorted(short(packed), reverse=True)
        assert short(mixed) not in (sorted(short(mixed)), sorted(short(mixed), reverse=True))

    @pytest.mark.parametrize("epoch", [0, 2])
    def test_the_order_is_that_of_philox(self, epoch):
        """A resumed run must find its data again with any version of numpy, so its order is that of a paper."""
        loader = make_loader(Documents([1] * 11), tokens_per_row=1, rows_per_step=1, window=6)
        documents = np.argsort(philox(11, [7, epoch], stream=0))
        expected = []
        for window, members in enumerate((documents[:6], documents[6:])):
            rows = np.argsort(philox(len(members), [7, epoch], stream=1 + window))
            expected += members[rows].tolist()
        assert documents_of_epoch(loader, epoch) == expected

    def test_empty_rows_fill_the_last_step(self):
        loader = make_loader(Documents([5] * 9), tokens_per_row=5)
        assert (loader.steps_in_epoch(0), loader.rows_in_epoch(0)) == (3, 9)
        last = loader.batch(2)
        assert (last.rows.segments.any(axis=1) == [True, False, False, False]).all()
        assert last.rows.weights.sum() == 4
        assert loader.place(3) == (1, 0, 0)

    def test_an_epoch_of_whole_steps_is_not_followed_by_an_empty_one(self):
        assert make_loader(Documents([5] * 8), tokens_per_row=5).place(2) == (1, 0, 0)


class TestRandomAccess:
    def test_any_step_at_any_time(self):
        """Asked for backwards, of a loader that knows nothing yet, steps are those of one that went in order."""
        forwards = make_loader()
        steps = range(forwards.total_steps(3))
        expected = [(forwards.place(step), forwards.rows_documents(step)) for step in steps]
        backwards = make_loader()
        assert [(backwards.place(s), backwards.rows_documents(s)) for s in reversed(steps)] == expected[::-1]
        for step in (0, len(steps) // 2, len(steps) - 1):
            alone = make_loader()
            assert (alone.place(step), alone.rows_documents(step)) == expected[step]
            assert_same(alone.batch(step), forwards.batch(step))

    def test_the_first_batch_needs_one_window(self):
        documents = Documents([20] * 320)
        make_loader(documents).batch(0)
        assert len(set(documents.asked)) == 32

    def test_known_costs_are_not_read(self):
        documents = Grouped([20] * 320, [1] * 320)
        make_loader(documents).total_steps(2)
        assert documents.asked == []

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=40).filter(any), st.integers(1, 9))
    @settings(deadline=None, max_examples=30)
    def test_the_order_is_over_entries(self, sizes, window):
        """Documents of an entry go where the entry goes: the windows of entries are those of as many plain ones."""
        grouped = Grouped([3] * sum(sizes), sizes)
        loader, plain = make_loader(grouped, window=window), make_loader(Documents([3] * len(sizes)), window=window)
        assert sorted(documents_of_epoch(loader, 0)) == list(range(sum(sizes)))
        for number in range(-(-len(sizes) // window)):
            entries = [index for row in plain.window_rows(1, number) for index in row]
            members = [index for row in loader.window_rows(1, number) for index in row]
            assert sorted(members) == sorted(grouped.members(np.array(entries))[0].tolist())

    def test_data_without_any_document_end(self):
        with pytest.raises(DataError, match="no documents: every example was dropped"):
            make_loader(Grouped([], [0] * 7)).batch(0)

    @pytest.mark.parametrize("step", [1, 15, 30])
    def test_a_saved_plan_spares_the_windows_before(self, step):
        """A resumed run reads the documents of its own window alone."""
        first = make_loader(window=16)
        first.batch(step)
        documents = Documents(first.documents.costs)
        again = make_loader(documents, window=16, plan=json.loads(json.dumps(first.plan())))
        assert_same(again.batch(step), first.batch(step))
        assert again.place(step) == first.place(step)
        assert len(set(documents.asked)) <= 3 * 16  # its own, and those that its last row reaches into

    def test_plans_that_were_forgotten_are_made_again(self):
        """More windows than are kept, from several threads at once."""
        expected = make_loader(window=4)
        steps = range(expected.total_steps(2))
        rows = [expected.rows_documents(step) for step in steps]
        loader, found = make_loader(window=4), {}

        def read(part):
            for step in part:
                found[step] = loader.rows_documents(step)

        threads = [threading.Thread(target=read, args=(steps[i::3],)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[step] for step in steps] == rows

    def test_beyond_the_end(self):
        loader = make_loader(epochs=2)
        total = loader.total_steps(2)
        loader.batch(total - 1)
        for step in (total, total + 100, -1):
            with pytest.raises(IndexError, match=f"step {step}"):
                loader.batch(step)


class TestHosts:
    @pytest.mark.parametrize("hosts", [1, 2, 4])
    def test_hosts_share_a_step(self, hosts):
        loader = make_loader()
        for step in epoch_steps(loader, 0):
            whole = loader.batch(step)
            share = 4 // hosts
            parts = [loader.batch(step, slice(h * share, (h + 1) * share)) for h in range(hosts)]
            joined = np.concatenate([part.rows.tokens for part in parts])
            np.testing.assert_array_equal(joined, whole.rows.tokens)
            np.testing.assert_array_equal(np.concatenate([p.example_ids for p in parts]), whole.example_ids)

    def test_a_share_without_documents_has_the_same_fields(self):
        documents = [branching([1, 2], [[3]], i, {"logps": [[0.5]]}, {"label": (1.0,)}) for i in range(5)]
        loader = make_loader(documents, tokens_per_row=3, branches=1)
        full, empty = loader.batch(0, slice(2, 4)), loader.batch(1, slice(2, 4))
        assert not empty.rows.segments.any()
        assert (empty.token.keys(), empty.completion.keys()) == (full.token.keys(), full.completion.keys())
        assert empty.token["logps"].shape == full.token["logps"].shape == (2, 3)


class TestIterate:
    @pytest.mark.parametrize("start", [0, 1, 17])
    def test_from_any_step(self, start):
        loader = make_loader()
        with loader.iterate(start) as batches:
            for step in range(start, start + 20):
                assert_same(next(batches), loader.batch(step))

    def test_ends_after_the_last_epoch(self):
        loader = make_loader(epochs=2)
        batches = loader.iterate()
        assert sum(1 for _ in batches) == loader.total_steps(2)
        assert list(batches) == []

    def test_takes_a_hosts_rows(self):
        loader = make_loader()
        with loader.iterate(2, slice(1, 3)) as batches:
            assert_same(next(batches), loader.batch(2, slice(1, 3)))

    def test_close_stops_the_threads(self):
        before = set(threading.enumerate())
        with make_loader().iterate() as batches:
            next(batches)
            assert set(threading.enumerate()) - before
        for thread in set(threading.enumerate()) - before:
            thread.join(timeout=10)
            assert not thread.is_alive()
        batches.close()
        with pytest.raises(StopIteration):
            next(batches)

    @pytest.mark.parametrize("known", [False, True])
    def test_an_error_reaches_the_reader(self, known):
        """An IndexError of the documents is a fault, and not taken for the end of the data."""
        documents = Grouped([5] * 40, [1] * 40) if known else Documents([5] * 40)
        cut = {"__len__": lambda self: 50, "__getitem__": lambda self, index: list(range(30))[index]}
        documents.__class__ = type("Cut", (documents.__class__,), cut)
        with pytest.raises(IndexError, match="list index out of range"), make_loader(documents).iterate() as batches:
            list(batches)


class TestBadInput:
    def test_no_documents(self):
        with pytest.raises(DataError, match="no documents"):
            make_loader([])

    def test_a_document_longer_than_a_row(self):
        documents = Documents([5, 5, 30])
        with pytest.raises(DataError, match=r"data.jsonl:3: the example takes 30 tokens, but a row holds 24"):
            make_loader(documents).batch(0)


def test_epochs_are_counted_by_source():
    """At the ends of windows by hand: source a is taken twice an epoch, of b every second example."""
    documents = Grouped([5] * 25, [1] * 25)
    documents.mixture = mix(("a", "b"), [10, 10], [("a", 2.0), ("b", 0.5)])
    loader = make_loader(documents, window=10, rows_per_step=1, tokens_per_row=25, shuffle=True)
    assert [loader.steps_in_epoch(0), loader.total_steps(2)] == [5, 10]
    for step, passed, epoch in [(1, 10, 0), (3, 20, 0), (4, 25, 0), (6, 10, 1), (8, 20, 1), (9, 25, 1)]:
        done = loader.epochs_done(step)
        assert done[""] == pytest.approx(epoch + passed / 25)
        order = loader._order(epoch)[:passed]
        expected = [2 * epoch + (order < 20).sum() / 10, epoch / 2 + (order >= 20).sum() / 10]
        assert [done["a"], done["b"]] == pytest.approx(expected)
    assert make_loader(Documents([5] * 9), rows_per_step=1, tokens_per_row=15).epochs_done(1) == {"": 2 / 3}


def test_statistics():
    """By hand: 6 pairs of 3 + 2 * 3 tokens; without sharing each would be 2 * 6."""
    documents = [branching([1, 2, 3, 4], [[5, 6], [7, 8]], i) for i in range(6)]
    loader = make_loader(documents, rows_per_step=4, tokens_per_row=20, documents_per_row=9, branches=2)
    assert row_statistics(loader) == {
        "documents": 6,
        "tokens": 54,
        "documents_per_row": 2.0,
        "padding_share": 1 - 54 / 60,
        "prompt_share_saved": 18 / 72,
    }
