"""Packing and the row layout, against plain loops: a completion's tokens see in a row what they would see alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.data.rows import build_batch, gather_completions, pack, take_rows
from jaxpost.errors import DataError
from jaxpost.types import Document, Origin
from tests.shared import SHARED, needs_shared


def linear(tokens, example_id=0, **token):
    weights = np.ones(len(tokens), np.float32)
    values = {name: (np.asarray(value, np.float32),) for name, value in token.items()}
    ids = (np.asarray(tokens, np.int32),)
    return Document(np.zeros(0, np.int32), ids, (weights,), example_id, Origin("data.jsonl", example_id + 1), values)


def branching(prompt, completions, example_id=0, token=None, completion=None):
    """token: {name: a list of values for each completion}; completion: {name: a value for each completion}."""
    return Document(
        prompt=np.asarray(prompt, np.int32),
        completions=tuple(np.asarray(c, np.int32) for c in completions),
        weights=tuple(np.ones(len(c), np.float32) for c in completions),
        example_id=example_id,
        origin=Origin("data.jsonl", example_id + 1),
        token={name: tuple(np.asarray(v, np.float32) for v in values) for name, values in (token or {}).items()},
        completion=completion or {},
    )


def check_packing(costs, rows, tokens_per_row, documents_per_row):
    assert sorted(index for row in rows for index in row) == list(range(len(costs)))
    for row in rows:
        assert 1 <= len(row) <= documents_per_row
        assert sum(costs[index] for index in row) <= tokens_per_row


def best_fit_decreasing(costs, tokens_per_row, documents_per_row):
    """The definition, by search through all rows."""
    rows = []
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        left = [tokens_per_row - sum(costs[i] for i in row) for row in rows]
        fits = [r for r, row in enumerate(rows) if left[r] >= costs[index] and len(row) < documents_per_row]
        if fits:
            rows[min(fits, key=lambda r: left[r])].append(index)
        else:
            rows.append([index])
    return rows


class TestPack:
    @given(
        costs=st.lists(st.integers(1, 20), max_size=60),
        tokens_per_row=st.integers(20, 45),
        documents_per_row=st.integers(1, 6),
    )
    @settings(deadline=None)
    def test_is_best_fit_decreasing(self, costs, tokens_per_row, documents_per_row):
        rows = pack(costs, tokens_per_row, documents_per_row)
        check_packing(costs, rows, tokens_per_row, documents_per_row)
        assert rows == best_fit_decreasing(costs, tokens_per_row, documents_per_row)

    def test_a_window_of_4096_documents(self):
        costs = np.random.default_rng(0).integers(20, 1200, 4096)
        rows = pack(costs, 4096, 64)
        check_packing(costs, rows, 4096, 64)
        assert 1 - costs.sum() / (4096 * len(rows)) < 0.01  # padding

    def test_refuses_what_no_row_holds(self):
        with pytest.raises(DataError, match="document 1 takes 9 tokens, but a row holds 8"):
            pack([3, 9], 8, 4)

    @needs_shared
    @pytest.mark.parametrize("case", ["bfd", "bfd_split"])
    def test_agrees_with_the_reference(self, case):
        """The reference truncates or splits long sequences itself; here callers do, so pack() is given the pieces."""
        oracle = json.loads((SHARED / "oracle" / "data_utils.json").read_text())
        size = oracle["cases"][case]["seq_length"]
        kept = [tokens if case == "bfd_split" else tokens[:size] for tokens in oracle["input_rows"]]
        pieces = [tokens[i : i + size] for tokens in kept for i in range(0, len(tokens), size)]
        rows = pack([len(piece) for piece in pieces], size, size)
        columns = oracle["cases"][case]["columns"]
        assert [[token for i in row for token in pieces[i]] for row in rows] == columns["input_ids"]
        assert [[len(pieces[i]) for i in row] for row in rows] == columns["seq_lengths"]


class TestLayout:
    def test_a_pair(self):
        """By hand: prompt 1 2 3, chosen 4 5, rejected 6; a document whose prompt is one token; an empty row."""
        pair = branching(
            [1, 2, 3],
            [[4, 5], [6]],
            example_id=7,
            token={"reference_logps": [[-0.5, -1.5], [-2.5]]},
            completion={"reward": (0.25, -0.75)},
        )
        single = branching([8], [[9]], 3, {"reference_logps": [[-3.5]]}, {"reward": (0.125,)})
        shape = {"rows_per_step": 2, "tokens_per_row": 10, "documents_per_row": 3, "branches": 2}
        batch = build_batch([[pair, single]], **shape)
        rows, none = batch.rows, [0] * 10
        #                                      prompt  chosen   rejected  second    empty
        np.testing.assert_array_equal(rows.tokens, [[1, 2, 3, 4, 5, 3, 6, 8, 9, 0], none])
        np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 1, 1, 1, 1, 2, 2, 0], none])
        np.testing.assert_array_equal(rows.branches, [[0, 0, 1, 1, 1, 2, 2, 1, 1, 0], none])
        np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 4, 2, 3, 0, 1, 0], none])
        np.testing.assert_array_equal(rows.weights, [[0, 0, 0, 1, 1, 0, 1, 0, 1, 0], none])
        logps = [[0, 0, 0, -0.5, -1.5, 0, -2.5, 0, -3.5, 0], none]
        np.testing.assert_array_equal(batch.token["reference_logps"], logps)
        absent = [[0, 0]] * 3
        np.testing.assert_array_equal(batch.completion["mask"], [[[1, 1], [1, 0], [0, 0]], absent])
        np.testing.assert_array_equal(batch.completion["reward"], [[[0.25, -0.75], [0.125, 0], [0, 0]], absent])
        np.testing.assert_array_equal(batch.example_ids, [[7, 3, -1], [-1, -1, -1]])

    def test_linear_documents(self):
        documents = [linear([1, 2, 3], 4, advantage=[0.5, 1.5, 2.5]), linear([5, 6], 2, advantage=[3.5, 4.5])]
        batch = build_batch([documents], rows_per_step=1, tokens_per_row=6, documents_per_row=2, branches=0)
        rows = batch.rows
        np.testing.assert_array_equal(rows.tokens, [[1, 2, 3, 5, 6, 0]])
        np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 2, 2, 0]])
        np.testing.assert_array_equal(rows.branches, [[0] * 6])
        np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 0, 1, 0]])
        np.testing.assert_array_equal(rows.weights, [[0, 1, 1, 0, 1, 0]])  # nothing predicts a first token
        np.testing.assert_array_equal(batch.token["advantage"], [[0.5, 1.5, 2.5, 3.5, 4.5, 0]])
        assert batch.completion == {}
        np.testing.assert_array_equal(batch.example_ids, [[4, 2]])

    def test_types(self):
        document = branching([1, 2], [[3]], token={"logps": [[0.5]]}, completion={"label": (1.0,)})
        batch = build_batch([[document]], rows_per_step=1, tokens_per_row=4, documents_per_row=1, branches=1)
        for name in ("tokens", "segments", "branches", "positions"):
            assert getattr(batch.rows, name).dtype == np.int32
        assert batch.example_ids.dtype == np.int32
        floats = [batch.rows.weights, batch.token["logps"], batch.completion["mask"], batch.completion["label"]]
        assert {array.dtype for array in floats} == {np.dtype(np.float32)}

    def test_values_of_several_numbers_a_token(self):
        """A teacher's top-2: its ids stay integers, and both keep their trailing dimension."""
        document = linear([1, 2])
        document.token["ids"] = (np.array([[7, 8], [9, 10]]),)
        document.token["logps"] = (np.array([[-1.0, -2.0], [-3.0, -4.0]]),)
        batch = build_batch([[document]], rows_per_step=1, tokens_per_row=3, documents_per_row=1, branches=0)
        np.testing.assert_array_equal(batch.token["ids"], [[[7, 8], [9, 10], [0, 0]]])
        np.testing.assert_array_equal(batch.token["logps"], [[[-1, -2], [-3, -4], [0, 0]]])
        assert (batch.token["ids"].dtype, batch.token["logps"].dtype) == (np.int32, np.float32)

    def test_no_documents(self):
        batch = build_batch([], rows_per_step=2, tokens_per_row=3, documents_per_row=1, branches=2)
        assert not batch.rows.segments.any() and not batch.rows.weights.any() and not batch.completion["mask"].any()
        assert (batch.example_ids == -1).all()

    @pytest.mark.parametrize(
        "rows, message",
        [
            ([[linear([1] * 9)]], r"data.jsonl:1: its row takes 9 tokens, but a row holds 8"),
            ([[linear([1]), linear([1]), linear([1])]], "its row has 3 documents, but a row holds 2"),
            ([[linear([1])], [linear([1])]], "2 rows given, but a step holds 1"),
            ([[branching([1], [[2], [3]])]], r"data.jsonl:1: has 2 completions, but at most 1 fit"),
            (
                [[linear([1], 0, a=[1]), linear([1], 1)]],
                r"data.jsonl:2: carries the token values \[\], .* carry \['a'\]",
            ),
        ],
    )
    def test_refuses_what_does_not_fit(self, rows, message):
        with pytest.raises(DataError, match=message):
            build_batch(rows, rows_per_step=1, tokens_per_row=8, documents_per_row=2, branches=1)

    def test_take_rows(self):
        documents = [branching([1, 2], [[i]], i, {"a": [[i]]}, {"b": (i,)}) for i in range(4)]
        rows = [[document] for document in documents]
        shape = {"tokens_per_row": 4, "documents_per_row": 1, "branches": 1}
        taken = take_rows(build_batch(rows, rows_per_step=4, **shape), slice(1, 3))
        assert_same(taken, build_batch(rows[1:3], rows_per_step=2, **shape))


@st.composite
def rows_of_documents(draw):
    """(rows, branches): linear documents, or branching ones with different numbers of completions."""
    branches = draw(st.integers(0, 3))
    count = draw(st.integers(0, 9))
    draw_tokens = lambda least: draw(st.lists(st.integers(1, 99), min_size=least, max_size=6))  # noqa: E731
    documents = []
    for i in range(count):
        if branches:
            completions = [draw_tokens(1) for _ in range(draw(st.integers(1, branches)))]
            values = [draw(st.lists(st.integers(-9, 9), min_size=len(c), max_size=len(c))) for c in completions]
            documents.append(branching(draw_tokens(1), completions, i, {"a": values}))
        else:
            ids = draw_tokens(1)
            documents.append(linear(ids, i, a=draw(st.lists(st.integers(-9, 9), min_size=len(ids), max_size=len(ids)))))
    packed = pack([document.cost for document in documents], 30, 4)
    return [[documents[i] for i in row] for row in packed], branches


@given(rows_of_documents())
@settings(deadline=None, max_examples=60)
def test_a_token_sees_what_it_would_see_alone(drawn):
    """Every token of every completion is in one place: there the rule of `Rows` shows it its plain sequence."""
    documents_of_rows, branches = drawn
    batch = lay_out(documents_of_rows, branches)
    rows = batch.rows
    targets = np.zeros(rows.tokens.shape, bool)
    for b, documents in enumerate(documents_of_rows):
        for m, document in enumerate(documents):
            for n, completion in enumerate(document.completions):
                branch = 0 if document.linear else n + 1
                in_branch = np.flatnonzero((rows.segments[b] == m + 1) & (rows.branches[b] == branch))
                first = 0 if document.linear else 1  # the copy of the prompt's last token comes first
                assert len(in_branch) == first + len(completion)
                sequence = [*document.prompt.tolist(), *completion.tolist()]
                for k, t in enumerate(in_branch[first:]):
                    seen = visible(rows, b, t)
                    length = len(document.prompt) + k + 1
                    assert rows.tokens[b, seen].tolist() == sequence[:length]
                    assert rows.positions[b, seen].tolist() == list(range(length))
                    assert rows.weights[b, t] == (0 if length == 1 else 1)
                    assert batch.token["a"][b, t] == document.token["a"][n][k]
                    if length > 1:  # the token before t in the row is the one that predicts it
                        assert seen[-2] == t - 1
                    targets[b, t] = True
    assert not rows.weights[~targets].any() and not any(values[~targets].any() for values in batch.token.values())
    occupied = rows.segments > 0
    assert occupied.sum() == sum(document.cost for documents in documents_of_rows for document in documents)
    assert not any(getattr(rows, name)[~occupied].any() for name in ("tokens", "branches", "positions", "weights"))


def lay_out(documents_of_rows, branches):
    """The batch, with an empty row at its end."""
    shape = {"tokens_per_row": 30, "documents_per_row": 4, "branches": branches}
    return build_batch(documents_of_rows, rows_per_step=len(documents_of_rows) + 1, **shape)


def visible(rows, b, t):
    """Keys that query t of row b sees, in the order of the row."""
    return [
        j
        for j in range(t + 1)
        if rows.segments[b, j] == rows.segments[b, t] and rows.branches[b, j] in (0, rows.branches[b, t])
    ]


@given(rows_of_documents())
@settings(deadline=None, max_examples=60)
def test_gather_is_the_reverse(drawn):
    documents_of_rows, branches = drawn
    batch = lay_out(documents_of_rows, branches)
    if not documents_of_rows:
        return
    *found, empty = gather_completions(batch.token["a"], batch.rows)
    assert empty == []
    for documents, row in zip(documents_of_rows, found, strict=True):
        for document, completions in zip(documents, row, strict=True):
            for expected, values in zip(document.token["a"], completions, strict=True):
                np.testing.assert_array_equal(values, expected)


def assert_same(a, b):
    for left, right in ((a.rows, b.rows), (a, b)):
        for name, value in vars(left).items():
            other = getattr(right, name)
            if isinstance(value, dict):
                assert value.keys() == other.keys()
                for key in value:
                    np.testing.assert_array_equal(value[key], other[key])
            elif isinstance(value, np.ndarray):
                assert value.dtype == other.dtype
                np.testing.assert_array_equal(value, other)
