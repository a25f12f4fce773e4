"""The decoder against a plain numpy forward, and its invariances (f32, 1e-5 relative to the largest value)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.models.policy import Policy
from jaxpost.ops.logprobs import row_logps
from jaxpost.ops.rope import inverse_frequencies
from jaxpost.types import Rows
from tests.models.tiny import linear_rows, patterned_config, random_documents, random_params, stack_rows, tiny_config

CONFIGS = {"llama": tiny_config(), "tied": tiny_config(tied=True), "patterned": patterned_config()}
ROWS = stack_rows(linear_rows(random_documents(9, 5), 16), linear_rows(random_documents(16, seed=1), 16))


def close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())), rtol=0)


def loss_and_grad(policy, params, rows):
    def loss(params):
        stats = row_logps(policy.hidden(params, rows)[0], policy.head(params), rows)
        return -stats.logps.sum() / rows.weights.sum()

    return jax.jit(jax.value_and_grad(loss))(params)


def numpy_forward(config, params, tokens):
    """Hidden states of one document int[T], layer by layer in float64."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    scanned = config.num_layers - config.tail_layers
    x, at = params["embed"]["weight"][tokens], np.arange(len(tokens))

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotate(x, rope):
        turn = np.exp(1j * at[:, None] * inverse_frequencies(rope, config.head_dim))[:, None]
        z = (x[..., : config.head_dim // 2] + 1j * x[..., config.head_dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    for i in range(config.num_layers):
        stack, row = ("layers", i) if i < scanned else ("tail", i - scanned)
        p = jax.tree.map(lambda p: p[row], params[stack])  # noqa: B023
        kind = config.pattern[i % len(config.pattern)]
        y = norm(x, p["attn_norm"]["scale"])
        q, k, v = (np.einsum("TD,DHh->THh", y, p["attn"][name]["weight"]) for name in "qkv")
        q, k = rotate(q, kind.rope), rotate(k, kind.rope)
        k, v = (np.repeat(z, config.num_heads // config.num_kv_heads, axis=1) for z in (k, v))
        scores = np.einsum("THh,SHh->HTS", q, k) / np.sqrt(config.head_dim)
        distance = at[:, None] - at[None]
        scores = np.where((distance >= 0) & (distance < (kind.window or len(at))), scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        x = x + np.einsum("HTS,SHh,HhD->TD", probs, v, p["attn"]["o"]["weight"])
        y = norm(x, p["mlp_norm"]["scale"])
        gate, up = y @ p["mlp"]["gate"]["weight"], y @ p["mlp"]["up"]["weight"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"]["weight"]
    return norm(x, params["final_norm"]["scale"])


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_plain_forward(name):
    policy = Policy(CONFIGS[name])
    params, [document] = random_params(policy), random_documents(16, seed=1)
    close(jax.jit(policy.hidden)(params, ROWS)[0][1], numpy_forward(CONFIGS[name], params, document))


@pytest.fixture(scope="module")
def unrolled():
    """Parameters of the patterned model, its loss and gradients by straight code without remat."""
    policy = Policy(CONFIGS["patterned"], unroll=True)
    params = random_params(policy)
    return params, loss_and_grad(policy, params, ROWS)


@pytest.mark.parametrize("remat", ["none", "full", "dots_no_batch"])
def test_scan_and_remat_change_nothing(remat, unrolled):
    params, expected = unrolled
    close(loss_and_grad(Policy(CONFIGS["patterned"], remat=remat, unroll=False), params, ROWS), expected)


def test_remat_really_computes_again():
    """In straight code too, where XLA could merge it with the first computation."""

    def flops(remat):
        policy = Policy(tiny_config(num_layers=1), remat=remat, unroll=True)
        step = jax.jit(jax.grad(lambda p: policy.hidden(p, ROWS)[0].sum()))
        return step.lower(policy.abstract()).compile().cost_analysis()["flops"]

    assert flops("full") > 1.2 * flops("none")


def test_unknown_remat_policy_names_the_key():
    with pytest.raises(ConfigError, match=r"remat\.policy.*'most'.*dots_no_batch"):
        Policy(tiny_config(), remat="most")


def test_packed_equals_one_document_at_a_time():
    policy = Policy(CONFIGS["patterned"])
    params, documents = random_params(policy), random_documents(9, 4, 12)
    hidden = jax.jit(lambda params, rows: policy.hidden(params, rows)[0])
    packed, start = hidden(params, linear_rows(documents, 32)), 0
    for document in documents:
        alone = hidden(params, linear_rows([document], 32))
        close(packed[:, start : start + len(document)], alone[:, : len(document)])
        start += len(document)


def test_shared_prompt_equals_copied_prompt():
    """Log-probabilities and the gradient of a document with two completions = those of two plain documents."""
    policy = Policy(CONFIGS["llama"])
    params = random_params(policy)
    prompt, first, second = random_documents(6, 4, 7)
    P, n1, n2 = len(prompt), len(first), len(second)
    width = 2 * P + n1 + n2
    filled = lambda *parts: np.resize(np.concatenate([*parts, np.zeros(width)]), (1, width)).astype(np.int32)  # noqa: E731
    branch = lambda n: P - 1 + np.arange(n + 1)  # noqa: E731 (positions: from the copy of the prompt's last token on)
    ours = Rows(
        tokens=filled(prompt, first, prompt[-1:], second),
        segments=filled(np.ones(P + n1 + 1 + n2)),
        branches=filled(np.zeros(P - 1), np.full(1 + n1, 1), np.full(1 + n2, 2)),
        positions=filled(np.arange(P - 1), branch(n1), branch(n2)),
        weights=filled(np.zeros(P), np.ones(n1), [0], np.ones(n2)).astype(np.float32),
    )
    copies = linear_rows([np.concatenate([prompt, first]), np.concatenate([prompt, second])], width)
    copies.weights[0, :P] = 0
    copies.weights[0, P + n1 : 2 * P + n1] = 0

    @jax.jit
    def run(params, rows):
        def loss(params):
            logps = row_logps(policy.hidden(params, rows)[0], policy.head(params), rows).logps
            return -logps.sum() / rows.weights.sum(), logps

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, found), ours_grad = run(params, ours)
    (_, expected), copies_grad = run(params, copies)
    assert (ours.weights > 0).sum() == n1 + n2
    close(found[ours.weights > 0], expected[copies.weights > 0])
    close(ours_grad, copies_grad)


@pytest.mark.parametrize(("unroll", "steps"), [(False, [3, 3, 2, 1]), (True, [1] * 6)])
def test_decoding_against_a_cache_equals_the_whole_row(unroll, steps):
    """Two prompts of unequal length in pieces of so many tokens, the shorter one's last pieces not full."""
    policy = Policy(CONFIGS["patterned"], unroll=unroll)
    params, documents = random_params(policy), random_documents(sum(steps), sum(steps) - 2, seed=3)
    decode, prepared = jax.jit(policy.decode), jax.jit(policy.prepared)(params)
    cache, parts = policy.new_cache(2, 16, chunk=max(steps)), []
    for start, stop in itertools.pairwise(np.cumsum([0, *steps])):
        piece, at = np.zeros((2, stop - start), np.int32), np.full((2, stop - start), -1, np.int32)
        for row, document in enumerate(documents):
            n = len(document[start:stop])
            piece[row, :n], at[row, :n] = document[start:stop], np.arange(start, start + n)
        hidden, cache = decode(prepared, piece, at, cache)
        parts.append(hidden)
    found = np.concatenate(parts, axis=1)
    hidden, _ = jax.jit(policy.hidden)(params, stack_rows(*(linear_rows([d], 16) for d in documents)))
    for row, document in enumerate(documents):
        close(found[row, : len(document)], hidden[row, : len(document)])
    assert cache.lengths.tolist() == [len(document) for document in documents]
    windows = [kv.k.shape[-2] for kv in cache.layers]
    assert min(windows) == 3 + max(steps) - 1 and max(windows) == 16  # a window keeps no more than it needs


def test_bf16_compute_keeps_f32_parameters_and_gradients():
    policy = Policy(CONFIGS["llama"], compute_dtype="bfloat16")
    params = random_params(policy)
    hidden, _ = jax.jit(policy.hidden)(params, ROWS)
    assert hidden.dtype == jnp.bfloat16
    gradients = jax.eval_shape(lambda p: loss_and_grad(policy, p, ROWS)[1], params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    exact, _ = jax.jit(Policy(CONFIGS["llama"]).hidden)(params, ROWS)
    close(hidden.astype(jnp.float32), exact, tolerance=0.05)


def test_every_parameter_has_its_axes_and_initial_scale():
    policy = Policy(CONFIGS["patterned"])
    abstract, axes = policy.abstract(), policy.axes()
    checked = jax.tree.map(lambda leaf, names: len(leaf.shape) == len(names), abstract, axes)
    assert all(jax.tree.leaves(checked))
    assert axes["tail"]["attn"]["o"]["weight"] == ("layers", "heads", "head_dim", "embed")
    wide = Policy(tiny_config(embed_dim=64, num_layers=2, num_heads=8, head_dim=16, mlp_dim=128))
    wide = jax.jit(wide.init)(jax.random.key(0))["layers"]
    assert float(wide["attn"]["q"]["weight"].std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(wide["attn"]["o"]["weight"].std()) == pytest.approx(128**-0.5, rel=0.05)
    assert not np.allclose(wide["mlp"]["up"]["weight"][0], wide["mlp"]["up"]["weight"][1])
