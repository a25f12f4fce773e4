"""What engines share: settings, prompts that fit, stop strings, the text that a reader sees."""

import re

import numpy as np
import pytest

from jaxpost import embedded
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.errors import ConfigError, DataError
from jaxpost.sampling.engine import Sampling, check_prompts, until_stop, visible_text
from jaxpost.types import Completion


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded.path("sft"))


def completion(tokens, reason="length"):
    return Completion(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), reason)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is out of range; expected at least 1"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens: 5 is out of range"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"temperature": float("inf")}, "temperature: inf"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"min_p": 1.5}, "min_p: 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0"),
        ({"stop": ("a", "")}, "stop: ('a', '')"),
        ({"choices": ()}, "choices: ()"),
        ({"choices": ((1,), ())}, "choices: ((1,), ())"),
    ],
)
def test_settings_that_cannot_be_are_named(values, message):
    with pytest.raises(ConfigError, match=f"^sampling.{re.escape(message)}"):
        Sampling(**values)


def test_filtered_is_what_changes_the_softmax():
    assert not Sampling(temperature=0.3, max_new_tokens=9, stop_ids=(2,), stop=("x",)).filtered
    changes = [{"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}, {"logit_bias": ((1, 2.0),)}]
    changes += [{"min_new_tokens": 1}, {"choices": ((1,),)}]
    assert all(Sampling(**change).filtered for change in changes)


def test_prompts_that_do_not_fit_are_named():
    settings = Sampling(max_new_tokens=4)
    check_prompts([np.ones(6, np.int32), np.ones(1, np.int32)], settings, 10)
    with pytest.raises(DataError, match=r"^prompt 1: 7 tokens and sampling.max_new_tokens = 4 are more than the 10"):
        check_prompts([np.ones(6, np.int32), np.ones(7, np.int32)], settings, 10)
    with pytest.raises(DataError, match=r"^prompt a.jsonl:3: empty"):
        check_prompts([np.ones(0, np.int32)], settings, 10, ["a.jsonl:3"])


def test_the_token_that_completes_a_stop_string(tokenizer):
    ids = tokenizer.encode("The capital of Nepal is Kathmandu. Glad to help you!")
    for stop in (("Nepal",), ("capital of",), ("you!", "Kath"), ("e",), ("al i",), ("nowhere",)):
        wanted = next(
            (n for n in range(1, len(ids) + 1) if any(string in tokenizer.decode(ids[:n]) for string in stop)), None
        )
        assert until_stop(ids, tokenizer.decode, stop) == wanted
    assert until_stop(ids, tokenizer.decode, ("you!", "Kath")) < len(ids)


def test_a_reader_sees_neither_stop_nor_what_comes_after(tokenizer):
    ids, end = tokenizer.encode("The capital is Kathmandu."), tokenizer.eos_id
    full = tokenizer.decode(ids)

    def seen(tokens, **settings):
        return visible_text(completion(tokens), tokenizer, Sampling(**settings))

    assert seen(ids) == seen(ids, stop_ids=(end,)) == seen([*ids, end], stop_ids=(end,)) == full
    assert seen(ids, stop_ids=(end, ids[-1])) == tokenizer.decode(ids[:-1])
    assert seen(ids, stop=("Kath", "is"), stop_ids=(end,)) == full[: full.index("is")]
    assert seen(ids, stop=(full,)) == seen([end], stop_ids=(end,)) == ""
