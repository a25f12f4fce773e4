"""Scores of answers: by a reward model, by a function, by both; what has no score is named."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxpost import api
from jaxpost.data.sources import open_source
from jaxpost.errors import ConfigError, ScoreError
from jaxpost.sampling.engine import Sampling
from jaxpost.sharding import make_mesh
from jaxpost.train.prompts import read_prompts
from jaxpost.train.scoring import Answer, Scored, open_scorer, refuse_failures, summed
from jaxpost.types import Completion
from tests.worlds import write_model

SETTINGS = {"timeout_s": 1.0, "workers": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return api.load(write_model(tmp_path_factory.mktemp("given") / "model")).model


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """Where a reward model of two heads lies."""
    return str(write_model(tmp_path_factory.mktemp("given") / "reward", seed=3, num_scores=2))


@pytest.fixture(scope="module")
def asked(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "prompts.jsonl"
    records = [{"messages": [{"role": "user", "content": f"Name colour {n}."}], "bonus": 100 * n} for n in range(2)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"prompt": "Once upon a time"}]))
    return read_prompts(open_source(path), model, Sampling(max_new_tokens=4))


def answers(asked, model, *texts) -> list[Answer]:
    """Stopped ones, and one that was cut by length at the end; to the prompts in turn."""
    found = []
    for n, text in enumerate(texts):
        cut = n == len(texts) - 1
        tokens = [*model.tokenizer.encode(text), *([] if cut else [model.tokenizer.eos_id])]
        completion = Completion(
            np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), "length" if cut else "stop"
        )
        found.append(Answer(asked[n % 2], completion, text))
    return found


def test_a_reward_model_reads_the_very_tokens(model, reward, asked):
    given = answers(asked, model, "Red.", "Blue, I think.", "Green and")
    loaded = api.load(reward)
    heads = np.concatenate([loaded.score_tokens([[*one.asked.tokens, *one.completion.tokens]]).heads for one in given])
    for combine, wanted in (("mean", heads.mean(1)), ("min", heads.min(1))):
        scorer = open_scorer(reward, "score.path", model, make_mesh(), combine=combine, **SETTINGS)
        found = scorer(given)
        np.testing.assert_allclose(found.values, wanted, atol=1e-5)
        np.testing.assert_allclose(found.spread, heads.std(1), atol=1e-5)
        assert found.failures == () and found.values.dtype == np.float64
        assert scorer([]).values.shape == (0,)
    refuse_failures(found)
    assert heads.std() > 1e-3  # else all of this could not fail


def test_a_reward_model_scores_alike_on_one_device_and_on_eight(model, reward, asked):
    given = answers(asked, model, "Red.", "Blue, I think.", "Green and", "Red?")
    meshes = make_mesh(devices=jax.devices()[:1]), make_mesh(data=2, fsdp=2, tensor=2)
    one, eight = (open_scorer(reward, "score.path", model, mesh, **SETTINGS)(given).values for mesh in meshes)
    np.testing.assert_allclose(one, eight, atol=1e-5)


def test_what_a_reward_model_cannot_read_is_a_failure_of_that_answer(model, reward, asked):
    given = answers(asked, model, "Red.", "blue " * 150, "Green")
    found = open_scorer(reward, "score.path", model, make_mesh(), **SETTINGS)(given)
    assert np.isnan(found.values).tolist() == [False, True, False]
    ((index, line),) = found.failures
    assert index == 1 and "tokens; the model scores 1 to 128" in line


def test_a_function_is_given_question_answer_and_record(model, asked):
    scorer = open_scorer("tests.tasks.rewards:length", "score.path", model, None, **SETTINGS)
    found = scorer(answers(asked, model, "Red.", "Blue.", "Green"))
    assert found.values.tolist() == [4, 105, 5] and found.spread is None
    scorer.close()


def test_the_world_s_rule_is_a_function(model, asked):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    conversation = dataclasses.replace(asked[0].example.prompt, messages=tuple(question))
    one = dataclasses.replace(asked[0], example=dataclasses.replace(asked[0].example, prompt=conversation))
    scorer = open_scorer("jaxpost.embedded.dialogues:gold", "score.gold", model, None, **SETTINGS)
    texts = ("The capital of France is Paris.", "The capital of France is Paris. Happy to help!", "Rome.")
    assert scorer(answers([one, one], model, *texts)).values.tolist() == [0.5, 1.0, 0.0]
    scorer.close()


def test_failures_are_named_and_can_stop_the_run(model, asked):
    scorer = open_scorer("tests.tasks.rewards:told", "score.path", model, None, **SETTINGS)
    found = scorer(answers(asked, model, "raise", "Blue.", "sleep", "nan", "none"))
    scorer.close()
    assert np.isnan(found.values).tolist() == [True, False, True, True, True]
    assert [index for index, _ in found.failures] == [0, 2, 3, 4]
    origin = asked[0].example.origin
    assert found.failures[1][1] == f"tests.tasks.rewards:told: {origin}, answer 'sleep': took longer than 1 s"
    with pytest.raises(ScoreError, match=r"^4 of 5 answers have no score: tests.*; \.\.\. \(set it\)$") as caught:
        refuse_failures(found, "set it")
    assert str(caught.value).count("rewards:told") == 3


def test_a_weighted_sum(model, reward, asked):
    given = answers(asked, model, "Red.", "raise", "Green")
    first = open_scorer(reward, "score.path", model, make_mesh(), **SETTINGS)
    second = open_scorer("tests.tasks.rewards:told", "score.path", model, None, **SETTINGS)
    both = summed([first, second], [2.0, -0.5])
    found, alone = both(given), first(given)
    np.testing.assert_allclose(found.values, 2 * alone.values - 0.5 * np.array([4, np.nan, 5]))
    np.testing.assert_allclose(found.spread, 2 * alone.spread)
    assert [index for index, _ in found.failures] == [
        1
    ] and both.name == f"2 * {reward} + -0.5 * tests.tasks.rewards:told"
    np.testing.assert_allclose(summed([first, first])(given).values, 2 * alone.values)
    assert summed([first]) is first and summed([first], [1.0]) is first
    np.testing.assert_allclose(summed([first], [3.0])(given).values, 3 * alone.values)
    both.close()


@pytest.mark.parametrize(
    "spec, message",
    [
        ("tests.tasks.rewards:missing", "score.path: cannot import 'tests.tasks.rewards:missing'"),
        ("{model}", "score.path: .* has words for a head, not scores; train it with stage=reward first"),
        ("embedded:nothing", "embedded:nothing: no such part of the embedded world"),
    ],
)
def test_what_scores_nothing_is_named(model, spec, message):
    with pytest.raises(ConfigError, match=message):
        open_scorer(spec.format(model=model.path), "score.path", model, make_mesh(), **SETTINGS)


def test_nothing_is_refused_where_nothing_failed():
    refuse_failures(Scored(np.zeros(3)))
