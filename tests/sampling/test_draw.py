"""Draws against numpy: which tokens are kept, and how often each is drawn (chi-square)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxpost.sampling import draw
from jaxpost.sampling.engine import Sampling
from jaxpost.sampling.local import Slots, choose, make_filters

V, DRAWS = 11, 20_000
LOGITS = np.array([2.0, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0, 1.5, -2.0, 0.25], np.float32)
SEEN = np.array([0, 5])


def numpy_distribution(s: Sampling, seen=SEEN) -> np.ndarray:
    """What the settings say, by sorting, one filter after another, in float64."""
    z = LOGITS.astype(np.float64)
    if s.repetition_penalty != 1:
        z[seen] = np.where(z[seen] > 0, z[seen] / s.repetition_penalty, z[seen] * s.repetition_penalty)
    for token, value in s.logit_bias:
        z[token] += value
    if s.min_new_tokens:
        z[list(s.stop_ids)] = -np.inf
    if s.choices:
        z[[token for token in range(V) if token not in [choice[0] for choice in s.choices]]] = -np.inf
    probs = softmax(z / s.temperature)
    order = np.argsort(-probs, kind="stable")
    if s.top_k is not None:
        probs = keep(probs, probs >= probs[order[s.top_k - 1]])
    if s.top_p < 1:
        order = np.argsort(-probs, kind="stable")
        last = np.searchsorted(np.cumsum(probs[order]), s.top_p)
        probs = keep(probs, probs >= probs[order[last]])
    if s.min_p > 0:
        probs = keep(probs, probs >= s.min_p * probs.max())
    return probs


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def keep(probs, kept):
    return np.where(kept, probs, 0) / probs[kept].sum()


CASES = {
    "softmax": Sampling(),
    "temperature": Sampling(temperature=0.5),
    "top_k": Sampling(top_k=4),
    "top_k_ties": Sampling(top_k=3),  # tokens 1 and 2 are equally likely, and both stay
    "top_p": Sampling(top_p=0.7),
    "top_p_hot": Sampling(top_p=0.9, temperature=1.7),
    "min_p": Sampling(min_p=0.2),
    "all": Sampling(temperature=1.3, top_k=8, top_p=0.95, min_p=0.1),
    "repetition": Sampling(repetition_penalty=1.8),
    "bias": Sampling(logit_bias=((7, 4.0), (0, -2.0))),
    "fewest": Sampling(min_new_tokens=3, stop_ids=(0, 8)),
    "choices": Sampling(choices=((3, 4), (8,), (9, 1))),
}


def slots_of(keys, seen=None):
    """Slots that have drawn nothing; `choose` asks no more of them."""
    fields = dict.fromkeys(Slots.__dataclass_fields__, np.zeros(len(keys), np.int32))
    return Slots(**fields | {"cache": None, "keys": keys, "seen": seen})


@pytest.mark.parametrize("name", CASES)
def test_frequencies(name):
    settings = CASES[name]
    seen = np.zeros((DRAWS, V), bool)
    seen[:, SEEN] = True
    seen = seen if settings.repetition_penalty != 1 else None
    slots = slots_of(jax.random.split(jax.random.key(7), DRAWS), seen)
    filters = jax.tree.map(jnp.asarray, make_filters(settings, V))
    tokens, logps, drawn_logps = jax.jit(choose)(filters, jnp.tile(LOGITS, (DRAWS, 1)), slots)
    expected = numpy_distribution(settings)
    counts = np.bincount(tokens, minlength=V)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible] * DRAWS).pvalue > 1e-3
    np.testing.assert_allclose(drawn_logps, np.log(expected[tokens]), atol=1e-5)
    np.testing.assert_allclose(logps, np.log(softmax(LOGITS / settings.temperature)[tokens]), atol=1e-5)


def test_greedy_is_the_likeliest_allowed():
    settings = Sampling(temperature=0, logit_bias=((0, -9.0),))
    slots = slots_of(jax.random.split(jax.random.key(0), 2))
    filters = jax.tree.map(jnp.asarray, make_filters(settings, V))
    tokens, logps, drawn_logps = choose(filters, jnp.tile(LOGITS, (2, 1)), slots)
    assert tokens.tolist() == [8, 8] and drawn_logps.tolist() == [0, 0]
    np.testing.assert_allclose(logps, np.log(softmax(LOGITS)[[8, 8]]), atol=1e-6)


def test_inversion_over_several_blocks():
    """Every number in [0, 1) gives the token that a cumulative sum in float64 gives, but at the very edges."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal(1000).astype(np.float32)
    logits[100:140] = -np.inf
    uniform = np.concatenate([[0.0, 1 - 2**-24], rng.random(2000)]).astype(np.float32)
    tokens, logps = jax.jit(draw.draw)(jnp.tile(logits, (len(uniform), 1)), uniform)
    probs = softmax(logits.astype(np.float64))
    sums = np.cumsum(probs)
    before = sums[tokens] - probs[tokens]
    assert (before - 1e-6 <= uniform).all() and (uniform <= sums[tokens] + 1e-6).all()
    assert np.isfinite(logits[tokens]).all()
    np.testing.assert_allclose(logps, np.log(probs[tokens]), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_thresholds_of_any_size(scale):
    logits = scale * np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    kept = np.isfinite(draw.top_k(jnp.asarray(logits), jnp.int32(7)))
    np.testing.assert_array_equal(kept, logits >= np.sort(logits)[:, -7, None])


@pytest.mark.parametrize("size", [5, 128, 300])
def test_the_likeliest_is_the_first_of_the_highest(size):
    logits = np.random.default_rng(0).integers(-9, 3, (40, size)).astype(np.float32)  # with many ties
    logits[0] = -np.inf
    logits[1, size // 2 :] = -np.inf
    np.testing.assert_array_equal(draw.likeliest(jnp.asarray(logits)), logits.argmax(-1))
