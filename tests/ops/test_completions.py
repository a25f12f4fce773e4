import numpy as np

from jaxpost.ops.completions import at_tokens, completion_ends, completion_sums, token_index
from jaxpost.types import Rows

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0, 0]], np.int32)
BRANCHES = np.array([[0, 1, 2, 2, 0, 1, 1, 0], [0, 2, 2, 0, 0, 0, 0, 0]], np.int32)


def test_sums_and_ends_equal_a_loop():
    values = np.random.default_rng(0).normal(size=SEGMENTS.shape).astype(np.float32)
    sums, ends = np.zeros((2, 3, 2), np.float32), np.zeros((2, 3, 2), np.int32)
    for b, t in np.ndindex(*SEGMENTS.shape):
        if SEGMENTS[b, t] and BRANCHES[b, t]:
            sums[b, SEGMENTS[b, t] - 1, BRANCHES[b, t] - 1] += values[b, t]
            ends[b, SEGMENTS[b, t] - 1, BRANCHES[b, t] - 1] = t
    rows = Rows(SEGMENTS, SEGMENTS, BRANCHES, SEGMENTS, values)
    np.testing.assert_allclose(completion_sums(values, rows, documents=3, branches=2), sums, rtol=1e-6)
    np.testing.assert_array_equal(completion_ends(rows, documents=3, branches=2), ends)


def test_values_of_completions_at_their_tokens_and_the_place_of_each_token():
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
    branches = np.array([[0, 1, 2, 2, 0, 1, 1, 0], [0, 2, 2, 2, 2, 0, 0, 0]], np.int32)
    scored = np.array([[0, 1, 1, 1, 0, 0, 1, 0], [0, 0, 1, 0, 1, 0, 0, 0]], np.float32)
    rows = Rows(segments, segments, branches, segments, scored)
    values = np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2)
    np.testing.assert_array_equal(at_tokens(values, rows), [[0, 1, 2, 2, 0, 3, 3, 0], [0, 6, 6, 6, 6, 0, 0, 0]])
    index = np.array(token_index(scored, rows, documents=2, branches=2))
    np.testing.assert_array_equal(index[scored > 0], [0, 0, 1, 0, 0, 1])
