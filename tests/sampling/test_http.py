"""The HTTP engine against a real server of the tests, which draws as vLLM does from a fake model."""

import dataclasses
import pathlib
import re
import sys
import time

import jax
import numpy as np
import pytest

from jaxpost.errors import ConfigError, DataError, EngineError
from jaxpost.sampling.engine import Sampling, sample
from jaxpost.sampling.http import HttpEngine
from tests.sampling.server import Server, complete, log_softmax, logits

PROMPTS = [np.array(ids, np.int32) for ids in ([1, 5, 7], [1, 9], [1, 5, 7, 8, 2])]
STOPS = (3, 4)
SHORT = Sampling(max_new_tokens=6, stop_ids=STOPS)
KEY = jax.random.key(7)


@pytest.fixture
def server():
    with Server() as server:
        yield server


def engine_of(server, **settings) -> HttpEngine:
    return HttpEngine(server.url, **{"timeout_s": 10.0, "retries": 2, "backoff_s": 0.01, **settings})


def draw(server, settings=SHORT, key=KEY, prompts=PROMPTS, engine=None, **kwargs):
    return sample(engine or engine_of(server), None, prompts, key, settings=settings, **kwargs)


def as_lists(found):
    return [[completion.tokens.tolist() for completion in of_prompt] for of_prompt in found]


def test_tokens_and_logps_are_what_the_server_drew(server):
    found = draw(server, completions=3)
    assert [len(of_prompt) for of_prompt in found] == [3, 3, 3]
    drawn = {(tuple(body["prompt"]), body["seed"]): complete(body) for body in server.requests}
    assert len(drawn) == 9
    for prompt, of_prompt in zip(PROMPTS, found, strict=True):
        theirs = [drawn.pop(key) for key in list(drawn) if key[0] == tuple(prompt.tolist())]
        for completion in of_prompt:
            _, logps, reason = next(t for t in theirs if t[0] == completion.tokens.tolist())
            assert completion.finish_reason == reason and completion.tokens.dtype == np.int32
            np.testing.assert_allclose(completion.logps, logps, rtol=1e-6)
            np.testing.assert_array_equal(completion.drawn_logps, completion.logps)
    assert {c.finish_reason for of_prompt in found for c in of_prompt} == {"stop", "length"}


def test_draws_depend_on_key_index_and_number_alone(server):
    whole = as_lists(draw(server, completions=3))
    assert whole == as_lists(draw(server, completions=3, engine=engine_of(server, concurrency=1)))
    assert as_lists(draw(server, prompts=PROMPTS[1:2], indices=[1], completions=3)) == whole[1:2]
    assert [of_prompt[:2] for of_prompt in whole] == as_lists(draw(server, completions=2))
    assert as_lists(draw(server, key=jax.random.key(8), completions=3)) != whole
    assert len({tuple(tokens) for tokens in whole[0]}) > 1
    same, other = as_lists(draw(server, prompts=PROMPTS[:1] * 2, indices=[4, 5]))
    assert same != other


def test_greedy_is_the_likeliest_token(server):
    settings = dataclasses.replace(SHORT, temperature=0.0, stop_ids=())
    for prompt, (completion,) in zip(PROMPTS, draw(server, settings), strict=True):
        tokens = prompt.tolist()
        for token, logp in zip(completion.tokens, completion.logps, strict=True):
            assert token == np.argmax(logits(tokens))
            assert logp == pytest.approx(log_softmax(logits(tokens)).max(), abs=1e-6)
            tokens.append(int(token))
        assert completion.finish_reason == "length" and len(completion.tokens) == 6
    assert all(body["ignore_eos"] for body in server.requests)


def test_every_setting_reaches_the_server(server):
    settings = Sampling(
        **{"max_new_tokens": 5, "min_new_tokens": 2, "top_k": 7, "top_p": 0.9, "min_p": 0.01},
        **{"repetition_penalty": 1.1, "logit_bias": ((4, -2.5),), "stop_ids": STOPS, "stop": ("END",)},
    )
    draw(server, settings, prompts=PROMPTS[:1])
    asked = server.requests[-1]
    wanted = {"max_tokens": 5, "min_tokens": 2, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "temperature": 1.0}
    wanted |= {"repetition_penalty": 1.1, "logit_bias": {"4": -2.5}, "stop_token_ids": [3, 4], "stop": ["END"]}
    wanted |= {"n": 1, "logprobs": 1, "return_token_ids": True, "ignore_eos": False, "model": "fake"}
    wanted |= {"include_stop_str_in_output": True, "skip_special_tokens": False, "prompt": PROMPTS[0].tolist()}
    assert {name: asked[name] for name in wanted} == wanted
    assert isinstance(asked["seed"], int) and 0 <= asked["seed"] < 2**31
    draw(server, SHORT, prompts=PROMPTS[:1])
    assert server.requests[-1]["top_k"] == -1 and "logit_bias" not in server.requests[-1]


def test_ids_in_place_of_text_do_where_there_are_no_others(server):
    whole = as_lists(draw(server))
    server.without = ("token_ids", "prompt_token_ids")
    assert as_lists(draw(server)) == whole


def test_no_more_requests_at_once_than_allowed(server):
    server.hang_s = 0.02
    draw(server, completions=5, engine=engine_of(server, concurrency=4))
    assert server.most_under_way == 4


def test_finished_prompts_come_before_the_others_are(server):
    stream = engine_of(server, concurrency=1).stream(None, PROMPTS, KEY, settings=SHORT)
    assert next(stream)[0] == 0
    server.hang_s = 30.0
    start = time.monotonic()
    stream.close()  # what is under way is given up
    assert time.monotonic() - start < 5


def test_choices_are_drawn_token_by_token_in_their_proportions(server):
    choices, prompt = ((10, 11), (10, 12), (13,), (13, 14)), PROMPTS[0]
    settings = Sampling(max_new_tokens=4, stop_ids=(3,), choices=choices)
    (found,) = draw(server, settings, prompts=[prompt], completions=300)
    drawn = [tuple(completion.tokens.tolist()) for completion in found]
    assert set(drawn) == {(10, 11), (10, 12), (13, 3), (13, 14)}  # a stop ends what could go on
    assert {completion.finish_reason for completion in found} == {"stop"}
    ids = prompt.tolist()
    first, second = logits(ids), logits([*ids, 10])
    wanted = np.exp(first[10]) / (np.exp(first[10]) + np.exp(first[13]))
    wanted *= np.exp(second[11]) / (np.exp(second[11]) + np.exp(second[12]))
    share = drawn.count((10, 11)) / 300
    assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 300)
    of_one = next(completion for completion in found if completion.tokens[0] == 13)
    assert of_one.logps[0] == pytest.approx(log_softmax(first)[13], abs=1e-5)  # as a trainer computes it: no bias


def test_a_choice_longer_than_allowed_ends_with_the_length(server):
    ((completion,),) = draw(server, Sampling(max_new_tokens=1, stop_ids=(3,), choices=((10, 11),)), prompts=PROMPTS[:1])
    assert (completion.tokens.tolist(), completion.finish_reason) == ([10], "length")


# ---- which log-probabilities a server reports ----

TOPPED = dataclasses.replace(SHORT, top_k=5)
WARM = dataclasses.replace(SHORT, temperature=0.7)


@pytest.mark.parametrize(
    "processed, settings, remedy",
    [
        (False, WARM, "start vLLM with --logprobs-mode=processed_logprobs, or set sampling.temperature=1"),
        (True, TOPPED, "start vLLM with --logprobs-mode=raw_logprobs, or leave the filters out"),
        (True, dataclasses.replace(TOPPED, temperature=2.0), "no server can with both temperature and filters"),
        (False, dataclasses.replace(TOPPED, temperature=2.0), "no server can with both temperature and filters"),
    ],
)
def test_logps_that_training_cannot_match_are_refused(server, processed, settings, remedy):
    server.processed = processed
    with pytest.raises(EngineError, match=re.escape(remedy)):
        draw(server, settings)
    found = draw(server, settings, engine=engine_of(server, need_logps=False))
    assert all(np.isnan(c.logps).all() and len(c.logps) == len(c.tokens) for (c,) in found)


def test_logps_after_temperature_or_before_filters_are_the_trainers(server):
    for server.processed, settings in ((True, WARM), (False, TOPPED)):
        for prompt, (completion,) in zip(PROMPTS, draw(server, settings), strict=True):
            tokens = prompt.tolist()
            for token, logp in zip(completion.tokens, completion.logps, strict=True):
                assert logp == pytest.approx(log_softmax(logits(tokens) / settings.temperature)[token], abs=1e-5)
                tokens.append(int(token))


# ---- what goes wrong ----


def test_what_fails_twice_is_tried_again(server, caplog):
    whole = as_lists(draw(server, prompts=PROMPTS[:1]))
    server.failures = [500, 503]
    assert as_lists(draw(server, prompts=PROMPTS[:1])) == whole
    assert "500 out of sorts; trying again" in caplog.text
    server.failures = [429, 500, 502]
    with pytest.raises(EngineError, match=f"^{server.url}/v1/completions: 502 out of sorts; given up after 3 tries$"):
        draw(server, prompts=PROMPTS[:1])


def test_a_refusal_is_not_tried_again(server):
    server.failures = [400]
    with pytest.raises(EngineError, match="refused prompt 6: 400 out of sorts"):
        draw(server, prompts=PROMPTS[:1], indices=[6])
    assert len(server.requests) == 1


def test_a_hanging_server_is_given_up(server):
    server.hang_s = 30.0
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"no reply in time \(sampling.timeout_s\); given up after 2 tries"):
        draw(server, engine=engine_of(server, timeout_s=0.2, retries=1))
    assert time.monotonic() - start < 10


def test_a_server_that_is_gone_is_named(server):
    engine = engine_of(server)
    draw(server, engine=engine)
    server.stop()
    with pytest.raises(EngineError, match=f"^{server.url}/v1/completions: .*; given up after 3 tries$"):
        draw(server, engine=engine)
    with pytest.raises(EngineError, match=f"^{server.url}/v1/models: .*; given up after 3 tries$"):
        draw(server)


@pytest.mark.parametrize(
    "without, change, message",
    [
        (("token_ids",), {"logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}}, "no token ids; wanted vLLM from"),
        (("logprobs",), {}, "no log-probability for each token; the server must allow logprobs=1"),
        ((), {"logprobs": {"token_logprobs": [None] * 6}}, "no log-probability for each token"),
        ((), {"prompt_token_ids": [1]}, "prompt 0 had 3 tokens, the server saw 1 others"),
        ((), {"finish_reason": "abort", "token_ids": [1], "logprobs": {"token_logprobs": [0.0]}}, "'abort'"),
    ],
)
def test_a_reply_without_what_was_asked_is_an_error(server, without, change, message):
    server.without, server.change = without, change
    with pytest.raises(EngineError, match=f"^{server.url}/v1/completions: .*{re.escape(message)}"):
        draw(server, prompts=PROMPTS[:1])


def test_bad_settings_and_prompts_are_told_before_anything_is_drawn(server):
    for url in ("localhost:8000", "ftp://x", "http://"):
        with pytest.raises(ConfigError, match=r"^sampling.url: "):
            HttpEngine(url)
    with pytest.raises(EngineError, match="no model mine; there are fake, other"):
        draw(server, engine=engine_of(server, model="mine"))
    with pytest.raises(ConfigError, match=r"sampling.logit_bias: servers take -100 to 100"):
        draw(server, dataclasses.replace(SHORT, logit_bias=((1, 200.0),)))
    with pytest.raises(ConfigError, match=r"sampling.choices: one begins another, and there is no stop token"):
        draw(server, Sampling(choices=((1,), (1, 2))))
    with pytest.raises(DataError, match=r"prompt 9: 63 tokens and sampling.max_new_tokens = 6 are more than the 64"):
        draw(server, prompts=[PROMPTS[0], np.ones(63, np.int32)], indices=[2, 9])
    assert server.requests == []
    assert draw(server, prompts=[]) == []


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(DataError, match=r"needs the package httpx2: pip install 'jaxpost\[http\]'"):
        HttpEngine("http://localhost:1")


def test_the_key_is_sent_and_either_form_of_url_will_do(server):
    engine = HttpEngine(server.url + "/v1/", api_key="secret")
    assert engine.url == server.url + "/v1"
    assert as_lists(draw(server, engine=engine)) == as_lists(draw(server))
    assert server.keys == ["Bearer secret"] * 3 + [None] * 3


# ---- new weights ----


def test_weights_reach_sglang_and_vllm(server):
    engine_of(server, reload=server.url + "/update_weights_from_disk").push(pathlib.Path("/run/export"))
    assert (server.paths, server.requests) == (["/update_weights_from_disk"], [{"model_path": "/run/export"}])
    engine_of(server, reload=server.url + "/collective_rpc").push("/run/export")
    assert server.paths[1:] == ["/collective_rpc", "/reset_prefix_cache"]
    assert server.requests[1:] == [{"method": "reload_weights", "kwargs": {"weights_path": "/run/export"}}, None]


PUSHED = []


def test_weights_reach_a_server_by_a_function_or_a_command(server, tmp_path):
    engine_of(server, reload=f"{__name__}:keep").push("/run/export")
    assert PUSHED == ["/run/export"]
    script = tmp_path / "reload.py"
    script.write_text("import sys, pathlib; pathlib.Path(__file__).with_name('got').write_text(sys.argv[1])")
    engine_of(server, reload=f"{sys.executable} {script}").push("/run/export")
    assert (tmp_path / "got").read_text() == "/run/export"


def keep(folder):
    PUSHED.append(folder)


def fail(folder):
    raise OSError("disk full")


def test_weights_that_were_not_loaded_are_an_error(server):
    url = server.url + "/update_weights_from_disk"
    server.reloaded = {"success": False, "message": "no such folder"}
    with pytest.raises(EngineError, match=f"^{url}: /x was not loaded .no such folder"):
        engine_of(server, reload=url).push("/x")
    with pytest.raises(EngineError, match="/nowhere: refused new weights: 404"):
        engine_of(server, reload=server.url + "/nowhere").push("/x")
    with pytest.raises(EngineError, match=r"sampling.reload: .*:fail\('/x'\) raised OSError\('disk full'\)"):
        engine_of(server, reload=f"{__name__}:fail").push("/x")
    with pytest.raises(EngineError, match=r"sampling.reload: false /x failed"):
        engine_of(server, reload="false").push("/x")
    with pytest.raises(EngineError, match=r"sampling.reload: no-such-command /x failed"):
        engine_of(server, reload="no-such-command").push("/x")
    with pytest.raises(ConfigError, match=r"sampling.reload: missing"):
        engine_of(server).push("/x")
