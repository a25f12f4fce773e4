"""A real pretrained model: its reference numbers, and a stand-in for each reference checkpoint's parity command."""

import jax
import numpy as np
import pytest

from jaxpost.models.hf import load_params, read_config
from jaxpost.models.policy import Policy
from jaxpost.ops.logprobs import row_logps
from tests.models.tiny import greedy, linear_rows
from tests.parity.checkpoints import check
from tests.shared import SHARED, needs_shared

FOLDER = SHARED / "models/stories260K"
CONTINUATION = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
)


@pytest.fixture(scope="module")
def stories():
    sentencepiece = pytest.importorskip("sentencepiece")
    policy = Policy(read_config(FOLDER))
    return policy, load_params(FOLDER, policy), sentencepiece.SentencePieceProcessor(str(FOLDER / "tokenizer.model"))


@needs_shared
def test_negative_log_likelihood_of_its_sample(stories):
    policy, params, tokenizer = stories
    ids = [1, *tokenizer.encode((FOLDER / "sample.txt").read_text()[:700])]
    assert len(ids) == 363
    rows = linear_rows([np.array(ids, np.int32)], len(ids))
    logps = jax.jit(lambda p: row_logps(policy.hidden(p, rows)[0], policy.head(p), rows).logps)(params)
    assert -float(logps.sum()) / 362 == pytest.approx(1.37690, abs=1e-5)


@needs_shared
def test_greedy_text(stories):
    policy, params, tokenizer = stories
    prompt = np.array([1, *tokenizer.encode("Once upon a time")], np.int32)
    [completion] = greedy(policy, params, [prompt], 40, policy.config.eos_ids)
    assert tokenizer.decode(completion.tokens.tolist()).startswith(CONTINUATION)


@needs_shared
@pytest.mark.parametrize(
    "name",
    [
        "llama_reward",
        "mixtral",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama_untied", "qwen2", "gemma2")),
    ],
)
def test_parity_of_the_reference_checkpoints(name):
    """What `python -m tests.parity.checkpoints` says of each."""
    assert check(SHARED / "oracle/hf" / name) == "passed"
