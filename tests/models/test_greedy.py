import jax
import numpy as np
import pytest

from jaxpost.models.policy import Policy
from jaxpost.sampling.greedy import greedy
from tests.models.tiny import linear_rows, patterned_config, random_documents, random_params

POLICY = Policy(patterned_config())
PROMPTS = random_documents(3, 7, 5)
NEW = 6


@pytest.fixture(scope="module")
def params():
    return random_params(POLICY)


@pytest.fixture(scope="module")
def expected(params):
    """One prompt, one token at a time, the whole sequence anew each time: tokens and their log-probabilities."""
    hidden = jax.jit(lambda params, rows: POLICY.hidden(params, rows)[0])
    results = []
    for prompt in PROMPTS:
        tokens, logps = list(prompt), []
        for _ in range(NEW):
            row = linear_rows([np.array(tokens, np.int32)], 16)
            logits = hidden(params, row)[0, len(tokens) - 1] @ params["head"]["weight"].T
            tokens.append(int(logits.argmax()))
            logps.append(float(jax.nn.log_softmax(logits).max()))
        results.append((tokens[len(prompt) :], logps))
    return results


def test_equals_a_loop_without_cache(params, expected):
    for completion, (tokens, logps) in zip(greedy(POLICY, params, PROMPTS, NEW, []), expected, strict=True):
        assert completion.tokens.tolist() == tokens
        assert completion.finish_reason == "length"
        np.testing.assert_allclose(completion.logps, logps, atol=1e-5)


def test_stops_after_the_first_stop_token(params, expected):
    stop = expected[0][0][2]
    for completion, (tokens, _) in zip(greedy(POLICY, params, PROMPTS, NEW, [stop]), expected, strict=True):
        n = tokens.index(stop) + 1 if stop in tokens else NEW
        assert completion.tokens.tolist() == tokens[:n]
        assert len(completion.logps) == n
        assert completion.finish_reason == ("stop" if stop in tokens else "length")


def test_no_prompts_and_empty_prompts(params):
    assert greedy(POLICY, params, [], NEW, []) == []
    with pytest.raises(ValueError, match="no token"):
        greedy(POLICY, params, [np.array([], np.int32)], NEW, [])
