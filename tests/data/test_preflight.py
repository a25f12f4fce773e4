"""Preflight: each problem from a planted document, none from good ones; the display by its plain text and colours."""

import io

import numpy as np
import pytest
from rich.console import Console

from jaxpost.data.dataset import load_dataset
from jaxpost.data.preflight import check, show_examples, summary
from jaxpost.data.templates import load_template
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.types import Document, Origin
from tests.shared import SHARED, needs_shared

BOS, EOS = 1, 2


def linear(ids, weights, line=1):
    ids, weights = np.array(ids, np.int32), np.array(weights, np.float32)
    return Document(np.zeros(0, np.int32), (ids,), (weights,), line - 1, Origin("data.jsonl", line))


def pair(prompt, chosen, rejected, line=1):
    ids = tuple(np.array(c, np.int32) for c in (chosen, rejected))
    weights = tuple(np.ones(len(c), np.float32) for c in ids)
    return Document(np.array(prompt, np.int32), ids, weights, line - 1, Origin("data.jsonl", line))


GOOD = [
    linear([BOS, 50, 51, 52, EOS], [0, 0, 1, 1, 1]),
    linear([BOS, 50, 51], [0, 1, 1]),  # raw text, a piece of which may end anywhere
    linear([BOS, 50, 51, EOS, 13], [0, 0, 1, 1, 1]),  # a line end behind the end of the turn
    pair([BOS, 50, 51], [52, EOS], [53, 54, EOS]),
]
BAD = {
    "two_bos": [linear([BOS, BOS, 50, EOS], [0, 0, 1, 1]), pair([BOS, BOS, 50], [52, EOS], [53, EOS])],
    "empty_mask": [linear([BOS, 50, EOS], [0, 0, 0])],
    "no_end_trained": [linear([BOS, 50, 51, EOS], [0, 0, 1, 0]), pair([BOS, 50], [52, EOS], [53, 54])],
    "beyond_vocabulary": [linear([BOS, 50, 300, EOS], [0, 0, 1, 1]), pair([BOS, 300], [52, EOS], [53, EOS])],
}


def test_good_documents_have_no_problems(tokenizer):
    assert check(GOOD, tokenizer, 300) == []


@pytest.mark.parametrize("reason", BAD)
def test_each_planted_problem_is_found(tokenizer, reason):
    for document in BAD[reason]:
        (problem,) = check([document], tokenizer, 300)
        assert problem.reason == reason and str(problem).startswith("data.jsonl:1: ")


def test_a_turn_that_ends_with_a_token_at_which_nothing_stops(write_tokenizer, tokenizer):
    end = tokenizer.vocab_size
    decoder = {str(end): {"content": "<|end|>", "special": True}}
    document = linear([BOS, 50, 51, end], [0, 0, 1, 1])
    (problem,) = check([document], load_tokenizer(write_tokenizer(added_tokens_decoder=decoder)), end + 1)
    assert problem.reason == "end_does_not_stop"
    assert problem.detail == "a turn ends with <|end|>, but generation stops at </s> only"
    folder = write_tokenizer(added_tokens_decoder=decoder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [2, {end}]}}')
    assert check([document], load_tokenizer(folder), end + 1) == []


def test_a_sample_at_even_distances_and_the_summary(tokenizer):
    documents = [linear([BOS, 50, EOS], [0, 0, 0], line) for line in range(1, 102)]
    problems = check(documents, tokenizer, 300, most=3)
    assert [problem.origin.line for problem in problems] == [1, 51, 101]
    assert summary(problems) == [
        "empty_mask: 3 of the documents; first data.jsonl:1: no token of a completion is trained"
    ]


def shown(document, tokenizer, colour=None, **options):
    stream = io.StringIO()
    console = Console(file=stream, width=200, color_system=colour, force_terminal=colour is not None)
    show_examples([document], tokenizer, 5, console, **options)
    return stream.getvalue()


def test_every_token_is_shown_and_trained_ones_are_marked(tokenizer):
    question, answer = tokenizer.encode("Yes No\n<user>"), tokenizer.encode("France")
    document = linear([BOS, *question, *answer, EOS], [0] * (1 + len(question)) + [1] * (len(answer) + 1), 4)
    text = shown(document, tokenizer)
    assert "example 3, data.jsonl:4" in text and "sequence: 7 tokens, 2 trained" in text
    assert "<s>| Yes| No|⏎\n|<user>|[[ France|</s>]]" in text
    coloured = shown(document, tokenizer, "truecolor")
    assert coloured.count("[[") == 0 and "France" in coloured and "\x1b[" in coloured


def test_colours_tell_trained_from_seen(tokenizer):
    """The same token in the same place, trained and not, is drawn in the two styles."""
    words = tokenizer.encode("France")
    styles = {}
    for weight in (0.0, 1.0):
        text = shown(linear([BOS, *words], [0, weight]), tokenizer, "truecolor")
        styles[weight] = next(line for line in text.splitlines() if "France" in line)
    assert styles[0.0] != styles[1.0]


def test_pairs_are_shown_in_three_parts_and_long_ones_cut_in_the_middle(tokenizer):
    many = tokenizer.encode(" ".join(["Yes"] * 50))
    text = shown(pair([BOS, *many], [52, EOS], [53, EOS]), tokenizer, most_tokens=10)
    places = [text.index(part) for part in ("prompt: 51", "chosen: 2", "rejected: 2")]
    assert places == sorted(places)
    assert text.count(" Yes") == 9 and f"... {len(many) + 1 - 10} tokens ..." in text


@needs_shared
def test_real_data_has_no_problems():
    tokenizer = load_tokenizer(SHARED / "models/stories260K")
    template = load_template("plain", tokenizer)
    for path in ("fastchat_chat/dummy_conversation.json", "llamafactory_demo/identity.json"):
        data = load_dataset(SHARED / "data" / path, tokenizer=tokenizer, template=template, kind="sft", max_tokens=1024)
        assert check(data.documents, tokenizer, 512) == []
