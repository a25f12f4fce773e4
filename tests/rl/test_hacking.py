"""What betrays reward hacking, by hand."""

import doctest

import numpy as np
import pytest

from jaxpost.rl import hacking
from jaxpost.types import Completion


def test_examples_in_docstrings():
    found = doctest.testmod(hacking)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("n", [1, 2, 4])
def test_repetition_by_a_loop(n):
    tokens = np.random.default_rng(0).integers(0, 3, 60)
    seen, again = set(), 0
    for start in range(len(tokens) - n + 1):
        gram = tuple(tokens[start : start + n])
        again += gram in seen
        seen.add(gram)
    assert hacking.repetition(tokens, n) == pytest.approx(again / (len(tokens) - n + 1))


@pytest.mark.parametrize("tokens, share", [([], 0), ([7, 7, 7], 0), ([1, 2, 3, 4, 5], 0), ([7] * 13, 0.9)])
def test_repetition_of_the_short_the_plain_and_the_loop(tokens, share):
    assert hacking.repetition(np.array(tokens, np.int32)) == pytest.approx(share)


def test_signs_of_a_rollout():
    texts = [([1, 2, 3], "stop"), ([7] * 13, "length"), ([1, 2, 3], "stop"), ([4, 5, 6, 7, 8], "stop")]
    found = hacking.signs([Completion(np.int32(t), np.zeros(len(t), np.float32), reason) for t, reason in texts])
    assert found == pytest.approx({"length": 6.0, "repetition": 0.9 / 4, "duplicates": 0.25, "no_eos": 0.25})


def test_spread_of_an_ensemble():
    np.testing.assert_allclose(hacking.spread([[1.0, 3.0], [2.0, 2.0]]), [1.0, 0.0])
