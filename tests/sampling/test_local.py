"""The engine against a loop without cache, and what it promises of draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError, DataError
from jaxpost.models.lora import Lora
from jaxpost.models.policy import Policy
from jaxpost.ops.logprobs import row_logps
from jaxpost.sampling.engine import Sampling, sample
from jaxpost.sampling.local import LocalEngine, roomy
from jaxpost.sharding import make_mesh, named_shardings
from tests.models.tiny import (
    experts_config,
    linear_rows,
    patterned_config,
    random_documents,
    random_params,
    stack_rows,
    tiny_config,
)

SMALL = dataclasses.replace(patterned_config(), num_layers=3)  # of each kind one in the period, and a tail
CONFIGS = {
    "patterned": patterned_config(),
    "experts": experts_config(),
    "capped": tiny_config(tied=True, attention_soft_cap=3.0, logit_soft_cap=4.0, qk_norm=True),
}
PROMPTS = random_documents(3, 1, 11, 6)
NEW, KEY = 9, jax.random.key(5)
SHAPE = {"slots": 3, "prefill_rows": 2, "prefill_tokens": 4, "block_steps": 4, "context": 24}


@pytest.fixture(scope="module")
def policy():
    return Policy(SMALL)


@pytest.fixture(scope="module")
def params(policy):
    return random_params(policy)


@pytest.fixture(scope="module")
def drawn(policy, params):
    """Three completions of each prompt, at temperature 0.8, some of which stop."""
    return sample(
        LocalEngine(policy, **SHAPE),
        params,
        PROMPTS,
        KEY,
        settings=Sampling(NEW, temperature=0.8, stop_ids=(2, 5)),
        completions=3,
    )


def recomputed(policy, params, prompt, completion, temperature):
    """Log-probabilities of a completion from the pass that trains."""
    row = linear_rows([np.concatenate([prompt, completion.tokens])], SHAPE["context"])
    return row_stats(policy, params, row, temperature)[0, len(prompt) : len(prompt) + len(completion.tokens)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def row_stats(policy, params, row, temperature):
    return row_logps(policy.hidden(params, row)[0], policy.head(params), row, temperature=temperature).logps


def same(a, b):
    return a.finish_reason == b.finish_reason and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "logps", "drawn_logps")
    )


@functools.cache
def greedy_without_cache(name):
    """(tokens, their log-probabilities) for each prompt: each token from a pass over the whole row."""
    policy = Policy(CONFIGS[name], unroll=False)
    params = random_params(policy)
    cap = policy.config.logit_soft_cap

    @jax.jit
    def logps(rows):
        z = policy.hidden(params, rows)[0] @ policy.head(params).weight.T
        return jax.nn.log_softmax(z if cap is None else cap * jnp.tanh(z / cap))

    texts, found = [list(prompt) for prompt in PROMPTS], [[] for _ in PROMPTS]
    for _ in range(NEW):
        rows = stack_rows(*(linear_rows([np.array(text, np.int32)], SHAPE["context"]) for text in texts))
        for text, taken, last in zip(texts, found, np.asarray(logps(rows)), strict=True):
            token = int(last[len(text) - 1].argmax())
            taken.append(last[len(text) - 1, token])
            text.append(token)
    return [(text[len(prompt) :], taken) for prompt, text, taken in zip(PROMPTS, texts, found, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("unroll", [True, False])
def test_greedy_equals_a_loop_without_cache(name, unroll):
    policy = Policy(CONFIGS[name], unroll=unroll)
    engine = LocalEngine(policy, **SHAPE)
    found = sample(engine, random_params(policy), PROMPTS, KEY, settings=Sampling(NEW, temperature=0))
    for (tokens, logps), (completion,) in zip(greedy_without_cache(name), found, strict=True):
        assert completion.tokens.tolist() == tokens
        assert completion.finish_reason == "length"
        np.testing.assert_allclose(completion.logps, logps, atol=1e-5)


def test_logps_are_those_of_training(policy, params, drawn):
    for prompt, completions in zip(PROMPTS, drawn, strict=True):
        for completion in completions:
            again = recomputed(policy, params, prompt, completion, 0.8)
            np.testing.assert_allclose(completion.logps, again, atol=1e-5)
            np.testing.assert_array_equal(completion.logps, completion.drawn_logps)  # nothing was filtered


def test_where_completions_end(drawn):
    ends = [c for completions in drawn for c in completions]
    assert {c.finish_reason for c in ends} == {"stop", "length"}
    for c in ends:
        stops = np.isin(c.tokens, (2, 5))
        assert not stops[:-1].any()
        assert c.finish_reason == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(c.tokens) == NEW


def test_a_draw_depends_on_its_own_key_alone(policy, params, drawn):
    """The same to the bit: again, alone, in another order, beside fewer completions. Different: another key, index."""
    engine, settings = LocalEngine(policy, **SHAPE), Sampling(NEW, temperature=0.8, stop_ids=(2, 5))
    again = sample(engine, params, PROMPTS, KEY, settings=settings, completions=3)
    assert all(same(a, b) for x, y in zip(again, drawn, strict=True) for a, b in zip(x, y, strict=True))
    [alone] = sample(engine, params, PROMPTS[2:3], KEY, settings=settings, completions=2, indices=[2])
    assert all(same(a, b) for a, b in zip(alone, drawn[2], strict=False))
    order = [3, 0, 2, 1]
    other = sample(engine, params, [PROMPTS[n] for n in order], KEY, settings=settings, completions=3, indices=order)
    assert all(same(a, b) for n, x in zip(order, other, strict=True) for a, b in zip(x, drawn[n], strict=True))
    texts = [c.tokens.tolist() for c in drawn[2]]
    assert len(set(map(tuple, texts))) == 3
    for changed in ({"key": jax.random.key(6)}, {"key": KEY, "indices": [7]}):
        [found] = sample(engine, params, PROMPTS[2:3], **changed, settings=settings, completions=3)
        assert [c.tokens.tolist() for c in found] != texts


def test_completions_have_limits_of_their_own(policy, params, drawn):
    engine, settings = LocalEngine(policy, **SHAPE), Sampling(NEW, temperature=0.8, stop_ids=(2, 5))
    limits = [[1, 4, NEW], [2, NEW, 3], [5, 1, 1], [NEW, 6, 2]]
    found = sample(engine, params, PROMPTS, KEY, settings=settings, completions=3, limits=limits)
    for x, y, most in zip(found, drawn, limits, strict=True):
        for a, b, limit in zip(x, y, most, strict=True):
            assert a.tokens.tolist() == b.tokens[:limit].tolist()
            assert a.finish_reason == ("length" if len(b.tokens) > limit else b.finish_reason)
    for wrong in ([[1, 1, 1]] * 3, [[1, 1, NEW + 1]] * 4, [[0, 1, 1]] * 4):
        with pytest.raises(ConfigError, match=r"limits: expected 4 x 3 .* of 1 to 9 new tokens"):
            sample(engine, params, PROMPTS, KEY, settings=settings, completions=3, limits=wrong)


def test_slots_pieces_and_blocks_change_nothing(policy, params, drawn):
    engine = LocalEngine(policy, slots=7, prefill_rows=3, prefill_tokens=16, block_steps=2)
    settings = Sampling(NEW, temperature=0.8, stop_ids=(2, 5))
    found = sample(engine, params, PROMPTS, KEY, settings=settings, completions=3)
    for x, y in zip(found, drawn, strict=True):
        for a, b in zip(x, y, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [pytest.param({"fsdp": 8}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_eight_devices_draw_as_one(policy, params, drawn, sizes):
    mesh = make_mesh(**sizes)
    placed = jax.device_put(params, named_shardings(policy.axes(), mesh, policy.abstract()))
    settings = Sampling(NEW, temperature=0.8, stop_ids=(2, 5))
    found = sample(LocalEngine(policy, mesh, **SHAPE), placed, PROMPTS, KEY, settings=settings, completions=3)
    for x, y in zip(found, drawn, strict=True):
        for a, b in zip(x, y, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


def test_adapters_sample_as_they_train():
    policy = Policy(SMALL, lora=Lora(2, 4.0, ("attn/q", "mlp/"), dora=True))
    params = random_params(policy)
    [[found]] = sample(LocalEngine(policy, **SHAPE), params, PROMPTS[2:3], KEY, settings=Sampling(NEW))
    np.testing.assert_allclose(found.logps, recomputed(policy, params, PROMPTS[2], found, 1.0), atol=1e-5)


def test_bf16_samples_as_it_trains():
    """Weights cast once are those that training casts in each step."""
    policy = Policy(SMALL, compute_dtype="bfloat16")
    params = random_params(policy)
    [[found]] = sample(LocalEngine(policy, **SHAPE), params, PROMPTS[2:3], KEY, settings=Sampling(NEW))
    np.testing.assert_allclose(found.logps, recomputed(policy, params, PROMPTS[2], found, 1.0), atol=0.1)


@pytest.mark.parametrize("unroll", [True, False])
def test_a_cache_in_int8_is_close(unroll):
    policy = Policy(SMALL, unroll=unroll)
    params = random_params(policy)
    engine = LocalEngine(policy, **SHAPE, quantized=True)
    [[found]] = sample(engine, params, PROMPTS[2:3], KEY, settings=Sampling(NEW))
    exact = recomputed(policy, params, PROMPTS[2], found, 1.0)
    assert 0 < np.abs(found.logps - exact).max() < 0.1
    assert {kv.k.dtype.name for kv in policy.new_cache(1, 8, quantized=True).layers} == {"int8"}


def decode(tokens):
    """A text in which every token is two letters."""
    return "".join(chr(97 + t // 8) + chr(97 + t % 8) for t in tokens)


def test_stop_strings_end_at_the_token_that_completes_them(policy, params):
    engine = LocalEngine(policy, **SHAPE, decode=decode)
    plain = sample(engine, params, PROMPTS, KEY, settings=Sampling(NEW), completions=2)
    text = decode(plain[2][1].tokens)
    stop = text[3:6]  # begins and ends within a token
    found = sample(engine, params, PROMPTS, KEY, settings=Sampling(NEW, stop=(stop, "zz")), completions=2)
    assert stop in decode(found[2][1].tokens) and found[2][1].finish_reason == "stop"
    for x, y in zip(found, plain, strict=True):
        for a, b in zip(x, y, strict=True):
            n = len(a.tokens)
            assert a.tokens.tolist() == b.tokens[:n].tolist()
            assert stop not in decode(a.tokens[:-1])
            assert (n < NEW) == (stop in decode(b.tokens[: NEW - 1])) or a.finish_reason == "stop"


def test_choices(policy, params):
    """Only what is given, whole, with renormalised probabilities; where one begins another a stop token says which."""
    choices = ((7, 8, 9), (7, 8), (30,))
    settings = Sampling(NEW, choices=choices, stop_ids=(2,))
    found = sample(LocalEngine(policy, **SHAPE), params, PROMPTS, KEY, settings=settings, completions=20)
    texts = {tuple(c.tokens.tolist()) for completions in found for c in completions}
    assert texts <= {(7, 8, 9), (7, 8, 2), (30,)} and len(texts) >= 2
    assert {c.finish_reason for completions in found for c in completions} == {"stop"}
    by_text = {tuple(c.tokens.tolist()): c.drawn_logps.sum() for c in found[0]}
    if len(by_text) == 3:
        np.testing.assert_allclose(np.exp(list(by_text.values())).sum(), 1.0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"sampling\.choices: one begins another"):
        settings = dataclasses.replace(settings, stop_ids=())
        sample(LocalEngine(policy, **SHAPE), params, PROMPTS, KEY, settings=settings)


def test_a_repetition_penalty_sees_prompt_and_completion(policy, params):
    settings = Sampling(NEW, temperature=0, repetition_penalty=1e6)
    for prompt, (completion,) in zip(
        PROMPTS, sample(LocalEngine(policy, **SHAPE), params, PROMPTS, KEY, settings=settings), strict=True
    ):
        whole = [*prompt[:1], *prompt[1:], *completion.tokens]
        assert len(set(completion.tokens.tolist())) == NEW
        assert not set(completion.tokens.tolist()) & set(whole[: len(prompt)])


def test_prompts_and_settings_that_cannot_be(policy, params):
    engine = LocalEngine(policy, **SHAPE)
    assert sample(engine, params, [], KEY, settings=Sampling(NEW)) == []
    with pytest.raises(DataError, match=r"prompt 7: 16 tokens .* more than the 24 .* lower sampling\.max_new_tokens"):
        sample(engine, params, random_documents(3, 16), KEY, settings=Sampling(NEW), indices=[2, 7])
    with pytest.raises(DataError, match="prompt 0: empty"):
        sample(engine, params, [np.array([], np.int32)], KEY, settings=Sampling(NEW))
    with pytest.raises(ConfigError, match=r"sampling\.stop_ids: .*vocabulary of 48"):
        sample(engine, params, PROMPTS, KEY, settings=Sampling(NEW, stop_ids=(48,)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", 200),
        ("temperature", -1.0),
        ("top_k", 0),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
        ("choices", ()),
    ],
)
def test_settings_name_what_is_wrong(name, value):
    with pytest.raises(ConfigError, match=rf"sampling\.{name}: .* out of range; expected"):
        Sampling(**{name: value})


def test_lengths_of_caches_are_few():
    lengths = [roomy(n) for n in range(1, 1025)]
    assert all(a >= n for n, a in enumerate(lengths, 1))
    assert len(set(lengths)) == 17 and max(a / max(n, 64) for n, a in enumerate(lengths, 1)) < 1.25
