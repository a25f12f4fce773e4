"""The prompts of a run: what is asked of records of any format, what is dropped, and in which order."""

import gzip
import json

import numpy as np
import pytest

from jaxpost import config as configs
from jaxpost import embedded
from jaxpost.errors import DataError
from jaxpost.train.prompts import Prompts, open_prompts
from jaxpost.train.setup import open_model

USER = {"role": "user", "content": "Who wrote Emma?"}
ANSWER = {"role": "assistant", "content": "Jane Austen."}
RECORDS = [
    {"messages": [USER, ANSWER], "answer": "Austen"},
    {"messages": [{**USER, "content": "Why? " * 40}], "answer": ""},
    {"messages": [ANSWER]},  # asks nothing
    {"messages": [{**USER, "content": "Who wrote Persuasion?"}], "answer": "Austen"},
]


def ppo_config(longest: int = 64, **data):
    values = {"stage": "ppo", "model": {"path": "embedded:sft"}, "score": {"reward": "a:b"}, "run": {"steps": 1}}
    values["data"] = {"train": "embedded", "cache_dir": "", **data}
    return configs.resolve(values | {"rollout": {"max_prompt_tokens": longest}})


@pytest.fixture
def opened(tmp_path):
    """opened(records, **data): the prompts of a file of these, and those held out."""

    def opened(records, **data) -> Prompts:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        config = ppo_config(**{"train": str(path), "eval_examples": 0, **data})
        train, held_out = open_prompts(config, open_model(config, None))
        assert (held_out is None) == (not config.data.eval_examples)
        return (train, held_out) if held_out else train

    return opened


def test_a_prompt_holds_its_record_and_is_rendered_as_it_is_asked(opened):
    prompts = opened(RECORDS, max_dropped=0.6)
    first, last = prompts[0], prompts[1]
    assert len(prompts) == 2 and first.record == RECORDS[0] and last.record == RECORDS[3]
    assert first.question == [USER] and first.example.origin.line == 1 and last.example.origin.line == 4
    model = open_model(ppo_config(), None)
    assert first.tokens.tolist() == model.template.encode([USER], model.tokenizer, add_generation_prompt=True)
    assert prompts.dataset.report.dropped == {"too_long": 1, "no_messages": 1}


def test_raw_text_is_asked_as_it_stands(opened):
    (one,) = opened([{"prompt": "Once upon a time", "target": "there"}])
    assert one.question == "Once upon a time" and one.record["target"] == "there"


def test_pairs_and_solutions_are_prompts_too(opened):
    pair = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "Me."}]}
    assert opened([pair])[0].question == [USER]
    assert opened([{"question": "2 + 2?", "answer": "#### 4"}])[0].record["answer"] == "#### 4"


def test_what_is_too_long_loses_its_beginning_where_that_is_asked_for(opened):
    prompts = opened(RECORDS[:2], on_long="truncate")
    assert [len(one.tokens) <= 64 for one in prompts] == [True, True] and len(prompts[1].tokens) == 64


def test_a_weight_repeats_and_the_quality_settings_leave_out(opened, tmp_path):
    records = [RECORDS[0], RECORDS[0], RECORDS[3]]
    assert len(opened(records)) == 3
    assert [one.example.origin.line for one in opened(records, quality={"exact_duplicates": True})] == [1, 3]
    assert len(opened(records, train=[[str(tmp_path / "prompts.jsonl"), 2.0]])) == 6


@pytest.mark.parametrize(
    "records, data, message",
    [
        (RECORDS, {"max_dropped": 0.1}, r"too_many_dropped: .*prompts.jsonl"),
        (RECORDS[2:], {"on_bad": "error"}, r"prompts.jsonl:1: prompt must be a list of at least one message"),
        ([RECORDS[1]], {"max_dropped": 1.0}, r"prompts.jsonl: nothing left: 1 of 1 examples dropped \(too_long 1\)"),
        ([{"text": "Once"}], {}, r"prompts.jsonl: found the format text, which holds sft data; prompt training takes"),
    ],
)
def test_what_cannot_be_asked_is_named(opened, records, data, message):
    with pytest.raises(DataError, match=message):
        opened(records, **data)


def test_the_order_is_every_prompt_once_an_epoch_and_known_from_the_step(opened):
    prompts = opened([{"prompt": f"Number {n}"} for n in range(10)])
    steps = [prompts.order(step, 4, seed=3).tolist() for step in range(10)]
    asked = [index for step in steps for index in step]
    for epoch in range(4):
        assert sorted(asked[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert asked[:10] != asked[10:20] != list(range(10))
    assert prompts.order(7, 4, seed=3).tolist() == steps[7] and prompts.order(7, 4, seed=4).tolist() != steps[7]
    assert np.bincount(prompts.order(0, 25, seed=0)).tolist().count(2) >= 5  # a step of more than all there are


def test_some_prompts_can_be_held_out(opened):
    records = [{"prompt": f"Number {n}"} for n in range(10)]
    train, held_out = opened(records, eval_examples=3)
    asked = [{one.question for one in part} for part in (train, held_out)]
    assert (len(train), len(held_out)) == (7, 3) and asked[0] | asked[1] == {record["prompt"] for record in records}


def test_the_embedded_world_asks_on_trained_facts_and_evaluates_on_others():
    config = ppo_config()
    train, held_out = open_prompts(config, open_model(config, None))
    assert len(train) == len(gzip.decompress(embedded.path("questions").read_bytes()).splitlines())
    assert len(held_out) == len(embedded.prompts())
    assert not {one.record["answer"] for one in train} & {one.record["answer"] for one in held_out}
