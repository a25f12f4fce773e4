"""Completions for a file of prompts: what a line says, going on after a stop, best of several."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from jaxpost import api, cli
from jaxpost.data.sources import open_source
from jaxpost.errors import DataError, ScoreError
from jaxpost.sampling.engine import Sampling
from jaxpost.train.generation import Output, generate
from jaxpost.train.prompts import read_prompts
from jaxpost.train.scoring import RewardModelScorer
from jaxpost.types import Completion
from tests.sampling.server import Server
from tests.worlds import write_model

RECORDS = [
    {"messages": [{"role": "user", "content": f"Name colour {n}."}, {"role": "assistant", "content": "Red."}]}
    for n in range(6)
] + [{"prompt": "Once upon a time"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return api.load(write_model(tmp_path_factory.mktemp("given") / "model"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return api.load(write_model(tmp_path_factory.mktemp("given") / "reward", seed=3, num_scores=2))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


class Counting:
    """An engine that draws 1 to 4 tokens by key, index and number, and yields the prompts last first."""

    def stream(self, params, prompts, key, *, settings, completions=1, indices=None):
        for n in reversed(range(len(prompts))):
            yield n, tuple(self.one(key, indices[n], g) for g in range(completions))

    def one(self, key, index, number):
        rng = np.random.default_rng([*np.asarray(jax.random.key_data(key)), index, number])
        tokens = rng.integers(5, 200, rng.integers(1, 5)).astype(np.int32)
        return Completion(tokens, -rng.random(len(tokens)).astype(np.float32), "length")


def settings_of(model, **values):
    return Sampling(**{"max_new_tokens": 4, "stop_ids": model.model.tokenizer.stop_ids, **values})


def run(model, prompts, to, most=None, settings=None, header=None, **kwargs):
    """Generates into `to`, all or as many prompts as `most`; the lines that are there then."""
    settings = settings or settings_of(model)
    asked = read_prompts(open_source(prompts), model.model, settings)
    output = Output(to, header or {"seed": 0})
    for count, _ in enumerate(generate(model, Counting(), asked, output, settings=settings, seed=0, **kwargs), 1):
        if count == most:
            break
    return [json.loads(line) for line in to.read_text().splitlines()]


def test_a_line_holds_prompt_and_completions(model, prompts, tmp_path):
    lines = run(model, prompts, tmp_path / "out.jsonl", completions=2, token_ids=True)
    assert [line["index"] for line in lines] == list(range(7))  # sorted, though drawn last first
    assert lines[2]["messages"] == RECORDS[2]["messages"][:1] and "prompt" not in lines[2]
    assert lines[6]["prompt"] == "Once upon a time" and "messages" not in lines[6]
    for line in lines:
        for number, found in enumerate(line["completions"]):
            drawn = Counting().one(jax.random.key(0), line["index"], number)
            assert found["token_ids"] == drawn.tokens.tolist() and found["tokens"] == len(drawn.tokens)
            assert found["text"] == model.model.tokenizer.decode(drawn.tokens.tolist())
            assert found["logp"] == pytest.approx(float(drawn.logps.sum()), abs=1e-6)
            assert found["finish_reason"] == "length" and "score" not in found


def test_the_model_sees_the_prompt_as_it_is_asked(model, prompts):
    opened = model.model
    asked = read_prompts(open_source(prompts), model.model, settings_of(model))
    wanted = opened.template.encode(RECORDS[0]["messages"][:1], opened.tokenizer, add_generation_prompt=True)
    assert asked[0].tokens.tolist() == wanted
    assert asked[6].tokens.tolist() == opened.tokenizer.with_bos(opened.tokenizer.encode("Once upon a time"))


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_file_that_was_stopped_ends_up_the_same(model, prompts, tmp_path, cut, caplog):
    caplog.set_level(logging.INFO, logger="jaxpost")
    whole = run(model, prompts, tmp_path / "whole.jsonl", completions=2)
    path = tmp_path / "out.jsonl"
    assert [line["index"] for line in run(model, prompts, path, most=3, completions=2)] == [6, 5, 4]
    path.write_bytes(path.read_bytes()[: -cut or None])  # killed while it wrote
    assert run(model, prompts, path, completions=2) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert ("half written" in caplog.text) == (cut > 0)
    assert run(model, prompts, path, completions=2) == whole  # nothing left to do


def test_what_was_made_otherwise_is_not_mixed(model, prompts, tmp_path):
    path = tmp_path / "out.jsonl"
    run(model, prompts, path, most=2, header={"seed": 0, "best_of": None})
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"out.jsonl: was begun with seed = 0, not 1; give another --to"):
        Output(path, {"seed": 1, "best_of": None})
    with pytest.raises(DataError, match=r"out.jsonl: was begun with best_of = null, not 4"):
        Output(path, {"seed": 0, "best_of": 4})
    path.write_bytes(before.replace(b'{"index": 6', b'{"index: 6'))
    with pytest.raises(DataError, match=r"out.jsonl:1: not a line that generate wrote"):
        Output(path, {"seed": 0, "best_of": None})
    other = tmp_path / "other.jsonl"
    other.write_text("mine\n")
    with pytest.raises(DataError, match=r"other.jsonl: exists, and no other.jsonl.settings.json says what it is"):
        Output(other, {"seed": 0})
    assert other.read_text() == "mine\n"


def test_the_best_of_several_by_the_reward_model(model, reward, prompts, tmp_path):
    score = RewardModelScorer(reward, model.model)
    every = run(model, prompts, tmp_path / "all.jsonl", completions=5, score=score, token_ids=True)
    best = run(model, prompts, tmp_path / "best.jsonl", completions=5, keep=2, score=score, token_ids=True)
    asked = read_prompts(open_source(prompts), model.model, settings_of(model))
    for line, kept, prompt in zip(every, best, asked, strict=True):
        wanted = [
            float(reward.score_tokens([[*prompt.tokens, *found["token_ids"]]]).mean[0]) for found in line["completions"]
        ]
        np.testing.assert_allclose([found["score"] for found in line["completions"]], wanted, atol=1e-5)
        order = np.argsort(wanted)[::-1][:2]
        assert [f["token_ids"] for f in kept["completions"]] == [line["completions"][i]["token_ids"] for i in order]


def test_a_reward_model_of_another_template_scores_the_text(model, reward, prompts, tmp_path):
    source = model.model.template.source + "{# another #}"
    template = type(model.model.template)(source, reward.model.tokenizer)
    other = dataclasses.replace(reward, model=dataclasses.replace(reward.model, template=template))
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:2]))
    for line in run(model, chats, tmp_path / "out.jsonl", completions=2, score=RewardModelScorer(other, model.model)):
        wanted = reward.score(line["messages"], [found["text"] for found in line["completions"]]).mean
        np.testing.assert_allclose([found["score"] for found in line["completions"]], wanted, atol=1e-5)
    with pytest.raises(ScoreError, match=r"prompts.jsonl:7: raw text, which a reward model of another tokenizer"):
        run(model, prompts, tmp_path / "raw.jsonl", score=RewardModelScorer(other, model.model))


def test_a_prompt_that_does_not_fit_is_named(model, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps({"prompt": "many words " * 60}) + "\n")
    with pytest.raises(DataError, match=r"long.jsonl:2: \d+ tokens and sampling.max_new_tokens = 4 are more than"):
        read_prompts(open_source(path), model.model, settings_of(model))


def test_a_fingerprint_is_of_the_weights(model, reward):
    assert api.load(model.model.path).fingerprint() == model.fingerprint() != reward.fingerprint()
    last = jax.tree.map(lambda leaf: leaf, model.params)
    last["embed"]["weight"] = last["embed"]["weight"].at[0, 3].add(1e-6)
    assert dataclasses.replace(model, params=last).fingerprint() != model.fingerprint()


# ---- the verb ----


def test_the_verb_draws_in_this_process_and_goes_on(model, reward, prompts, tmp_path, capsys):
    def made(name, *flags):
        path = tmp_path / name
        given = [f"--checkpoint={model.model.path}", f"--prompts={prompts}", f"--to={path}", "--max-new-tokens=6"]
        assert cli.main(["generate", *given, "--slots=4", *flags]) == 0
        return path.read_bytes()

    whole = made("out.jsonl", "--completions=2")
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["index"] for line in lines] == list(range(7))
    assert all(len(line["completions"]) == 2 and line["completions"][0]["logp"] < 0 for line in lines)
    (tmp_path / "out.jsonl").write_bytes(b"\n".join(whole.split(b"\n")[3:])[:-9])
    assert made("out.jsonl", "--completions=2") == whole  # to the bit, whatever was there
    assert "going on after 3 of 7 prompts" in capsys.readouterr().out
    assert made("other.jsonl", "--completions=2", "--seed=1") != whole
    every = [
        json.loads(line) for line in made("all.jsonl", "--completions=4", f"--reward={reward.model.path}").splitlines()
    ]
    best = [
        json.loads(line) for line in made("best.jsonl", "--best-of=4", f"--reward={reward.model.path}").splitlines()
    ]
    for line, kept in zip(every, best, strict=True):
        assert kept["completions"] == [max(line["completions"], key=lambda found: found["score"])]
    by_length = [json.loads(line) for line in made("long.jsonl", "--reward=tests.tasks.rewards:length").splitlines()]
    for line in by_length:
        assert [found["score"] for found in line["completions"]] == [
            len(found["text"]) for found in line["completions"]
        ]


def test_the_verb_draws_from_a_server_and_goes_on(model, prompts, tmp_path, capsys, monkeypatch):
    to = tmp_path / "out.jsonl"
    with Server() as server:
        server.context = 128
        given = [f"--checkpoint={model.model.path}", f"--prompts={prompts}", f"--to={to}", f"--url={server.url}"]
        given += ["--max-new-tokens=5", "--completions=2", "--temperature=0.8", "--top-k=10", "--token-ids"]
        assert cli.main(["generate", *given]) == 0
        lines = [json.loads(line) for line in to.read_text().splitlines()]
        assert [line["index"] for line in lines] == list(range(7))
        asked = server.requests[-1]  # the first is the test of what is reported
        assert (asked["temperature"], asked["top_k"], asked["max_tokens"]) == (0.8, 10, 5)
        assert asked["stop_token_ids"] == list(model.model.tokenizer.stop_ids)
        assert lines[0]["completions"][0]["logp"] is None  # before temperature and filters: not those of the draw
        content = to.read_bytes()
        to.write_bytes(content[:-40])
        count = len(server.requests)
        assert cli.main(["generate", *given]) == 0
        assert to.read_bytes() == content and len(server.requests) == count + 3  # the test, and two completions
        capsys.readouterr()
        assert cli.main(["generate", *given, "--top-k=11"]) == 2
        assert "out.jsonl: was begun with sampling.top_k = 10, not 11" in capsys.readouterr().err
    to.write_bytes(content[:-40])
    monkeypatch.setattr("jaxpost.sampling.http.LONGEST_WAIT", 0.0)
    assert cli.main(["generate", *given]) == 2
    assert f"error: {server.url}/v1/models: " in capsys.readouterr().err
    assert len(to.read_text().splitlines()) == 6  # what was there is there
