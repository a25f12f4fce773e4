import numpy as np

from jaxpost.ops.completions import completion_sums
from jaxpost.types import Rows


def test_sums_equal_a_loop():
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0, 0]], np.int32)
    branches = np.array([[0, 1, 2, 2, 0, 1, 1, 0], [0, 2, 2, 0, 0, 0, 0, 0]], np.int32)
    values = rng.normal(size=segments.shape).astype(np.float32)
    wanted = np.zeros((2, 3, 2), np.float32)
    for b, t in np.ndindex(*segments.shape):
        if segments[b, t] and branches[b, t]:
            wanted[b, segments[b, t] - 1, branches[b, t] - 1] += values[b, t]
    rows = Rows(segments, segments, branches, segments, values)
    np.testing.assert_allclose(completion_sums(values, rows, documents=3, branches=2), wanted, rtol=1e-6)
