"""What betrays a policy that games its reward, from the completions alone (numpy, host)."""

from collections.abc import Sequence

import numpy as np

from jaxpost.types import Array, Completion


def repetition(tokens: Array, n: int = 4) -> float:
    """Share of a completion's n-grams that stood in it before: 0 none, near 1 a loop. 0 where it has no n-gram.

    Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training", arXiv:1908.04319 (seq-rep-n).

    >>> repetition([1, 2, 1, 2, 1, 2], n=2)  # (1, 2), (2, 1), and three that stood before
    0.6
    """
    tokens = np.asarray(tokens)
    if len(tokens) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def duplicates(completions: Sequence[Array]) -> float:
    """Share of completions that equal one before them.

    >>> duplicates([[1, 2], [3], [1, 2], [1, 2]])
    0.5
    """
    if not completions:
        return 0.0
    return 1 - len({tuple(np.asarray(tokens).tolist()) for tokens in completions}) / len(completions)


def signs(completions: Sequence[Completion], n: int = 4) -> dict[str, float]:
    """Means over the completions of one rollout, by the names under which they are logged."""
    return {
        "length": float(np.mean([len(c.tokens) for c in completions])),
        "repetition": float(np.mean([repetition(c.tokens, n) for c in completions])),
        "duplicates": duplicates([c.tokens for c in completions]),
        "no_eos": float(np.mean([c.finish_reason == "length" for c in completions])),
    }


def spread(scores: Array) -> Array:
    """Standard deviation over the heads of a reward ensemble, scores [..., R] -> [...]: large where they guess."""
    return np.asarray(scores).std(axis=-1)
