"""Answers to other prompts: who meets whom, what is cut, and that rows are packed by the new lengths."""

import numpy as np
import pytest

from jaxpost.data.loader import Loader
from jaxpost.data.mismatched import Mismatched
from jaxpost.types import Document, Origin


def document(index, prompt, completion):
    """Tokens 1.. of its prompt; every completion says whose it is: 100 + index."""
    tokens = np.full(completion, 100 + index, np.int32)
    weights = np.ones(completion, np.float32)
    label = {"label": (float(index % 2),)}
    return Document(np.array(prompt, np.int32), (tokens,), (weights,), index, Origin("f", index + 1), {}, label)


class Listed(list):
    """Documents as a data set gives them: with members by entry, one document each."""

    entries = property(len)

    def members(self, entries):
        return entries, np.array([self[i].cost for i in entries.tolist()])


def documents(count=20, prompts=5, length=4):
    return Listed(document(i, [1 + i % prompts] * 3, 1 + i % length) for i in range(count))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_second_answer_is_to_another_prompt(seed):
    given = documents()
    made = Mismatched(given, max_tokens=64, row_tokens=64, seed=seed)
    assert len(made) == 20 and (made.cut, made.alone) == (0, 0)
    for index in range(20):
        document = made[index]
        other = int(document.completions[1][0]) - 100
        assert not np.array_equal(given[other].prompt, document.prompt)
        np.testing.assert_array_equal(document.completions[1], given[other].completions[0])
        assert document.completion == {"label": (float(index % 2), 0.0)} and len(document.weights) == 2
    again = Mismatched(given, max_tokens=64, row_tokens=64, seed=seed)
    assert all(np.array_equal(again[i].completions[1], made[i].completions[1]) for i in range(20))


def test_every_answer_is_met_once_where_all_prompts_differ():
    made = Mismatched(documents(prompts=20), max_tokens=64, row_tokens=64, seed=0)
    assert sorted(int(d.completions[1][0]) - 100 for d in made) == list(range(20))


def test_the_draw_depends_on_the_seed():
    partners = [
        [int(d.completions[1][0]) for d in Mismatched(documents(), max_tokens=64, row_tokens=64, seed=seed)]
        for seed in (0, 1)
    ]
    assert partners[0] != partners[1]


@pytest.mark.parametrize(
    "limits, room",
    [
        ({"max_tokens": 5, "row_tokens": 64}, 2),  # 3 of the prompt
        ({"max_tokens": 64, "row_tokens": 13}, 3),  # 2 of the prompt, its last token twice, 6 of the own answer
    ],
)
def test_what_does_not_fit_is_cut_at_its_end(limits, room):
    given = Listed([document(0, [1, 1, 1], 6), document(1, [2, 2, 2], 4)])
    made = Mismatched(given, **limits, seed=0)
    np.testing.assert_array_equal(made[0].completions[1], [101] * room)
    assert len(made[0].weights[1]) == room and made.cut >= 1


@pytest.mark.parametrize("given", [documents(prompts=1), documents(count=1), Listed()])
def test_without_another_prompt_there_is_no_second_answer(given):
    made = Mismatched(given, max_tokens=64, row_tokens=64, seed=0)
    assert made.alone == len(given) and all(len(d.completions) == 1 for d in made)


def test_rows_hold_what_the_documents_cost():
    given = documents(count=50)
    made = Mismatched(given, max_tokens=64, row_tokens=24, seed=0)
    indices, costs = made.members(np.arange(50))
    assert costs.tolist() == [made[i].cost for i in indices.tolist()]
    loader = Loader(
        made, rows_per_step=2, tokens_per_row=24, documents_per_row=4, branches=2, seed=0, epochs=1
    )  # fmt: skip
    seen = [loader.batch(step).example_ids for step in range(loader.steps_in_epoch(0))]
    assert sorted(i for ids in seen for i in ids.ravel().tolist() if i >= 0) == list(range(50))
