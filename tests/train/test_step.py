"""The train step: exact under accumulation and over devices, with weights that come before the backward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.data.rows import build_batch
from jaxpost.losses import preference, sft
from jaxpost.models.policy import Policy
from jaxpost.sharding import batch_sharding, make_mesh, named_shardings
from jaxpost.train.objectives import preference_objective, sft_objective, token_logps_of
from jaxpost.train.step import _microbatches, make_train_step
from jaxpost.types import Document, Origin, TrainState
from tests.models.tiny import linear_rows, random_params, tiny_config

ROWS, T = 8, 48


def document(rng, prompt, lengths, index, reference=False):
    """Random tokens: a pair where `lengths` has two, a linear document with an untrained head where it has one."""
    draw = lambda n: rng.integers(1, 48, n).astype(np.int32)  # noqa: E731
    completions = tuple(draw(n) for n in lengths)
    weights = tuple(np.ones(n, np.float32) for n in lengths)
    token = {"reference_logps": tuple(-rng.random(n).astype(np.float32) for n in lengths)} if reference else {}
    return Document(draw(prompt), completions, weights, index, Origin("test", index + 1), token)


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_config(num_layers=2))


@pytest.fixture(scope="module")
def params(policy):
    return random_params(policy)


@pytest.fixture(scope="module")
def pair_batch():
    """Rows with unequal numbers of pairs, the last ones empty."""
    rng = np.random.default_rng(0)
    documents = [document(rng, 4, rng.integers(2, 7, 2), i, reference=True) for i in range(11)]
    rows = [documents[0:3], documents[3:4], documents[4:6], documents[6:9], documents[9:10], documents[10:11]]
    return build_batch(rows, rows_per_step=ROWS, tokens_per_row=T, documents_per_row=3, branches=2)


def dpo(policy, chunk=64):
    return preference_objective(policy, {"dpo": (1.0, functools.partial(preference.sigmoid, beta=0.3))}, chunk=chunk)


def one_step(policy, params, batch, accumulate=1, mesh=None, objective=dpo):
    """(loss, gradient norm, new params) of one SGD step, from a jitted step with donation left out."""
    optimizer = optax.sgd(1.0)
    step = make_train_step(objective(policy), optimizer, accumulate)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0), None)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    shardings = named_shardings(policy.axes(), mesh, policy.abstract())
    with jax.set_mesh(mesh):
        state = dataclasses.replace(state, params=jax.device_put(params, shardings))
        new, metrics = jax.jit(step)(state, None, jax.device_put(batch, batch_sharding(mesh)))
    return jax.device_get(({name: mean.value for name, mean in metrics.items()}, new.params))


@pytest.fixture(scope="module")
def plain(policy, params, pair_batch):
    return one_step(policy, params, pair_batch)


def assert_close(ours, theirs, tolerance=1e-5):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=str(path))


def test_loss_equals_a_loop_over_pairs(policy, params, pair_batch, plain):
    """Mean over the 11 pairs of -log sigma(beta * difference of log-ratios), each sequence scored alone."""
    head = policy.head(params)
    score = jax.jit(lambda row: jax.nn.log_softmax(policy.hidden(params, row)[0][0] @ head.weight.T))

    def logp(tokens, start):
        logps = score(linear_rows([tokens], 16))
        return sum(float(logps[t - 1, tokens[t]]) for t in range(start, len(tokens)))

    rng = np.random.default_rng(0)
    losses = []
    for i in range(11):
        d = document(rng, 4, rng.integers(2, 7, 2), i, reference=True)
        ratios = [
            logp(np.concatenate([d.prompt, c]), len(d.prompt)) - reference.sum()
            for c, reference in zip(d.completions, d.token["reference_logps"], strict=True)
        ]
        losses.append(np.log1p(np.exp(-0.3 * (ratios[0] - ratios[1]))))
    np.testing.assert_allclose(plain[0]["loss"], np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_nothing(policy, params, pair_batch, plain, accumulate):
    """Microbatches hold different numbers of pairs, some none: an average of averages would differ."""
    assert_close(one_step(policy, params, pair_batch, accumulate), plain)


@pytest.mark.parametrize(
    "sizes", [{"data": 8, "fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_eight_devices_equal_one(policy, params, pair_batch, plain, sizes):
    assert_close(one_step(policy, params, pair_batch, mesh=make_mesh(**sizes)), plain)


def test_accumulation_over_devices_keeps_rows_where_they_are(policy, params, pair_batch, plain):
    """Trap 3: `reshape(accumulate, -1)` of a sharded batch gathers it, and every device computes every row."""
    assert_close(one_step(policy, params, pair_batch, accumulate=2, mesh=make_mesh(data=4, fsdp=1, tensor=2)), plain)
    mesh = make_mesh(data=4, fsdp=1, tensor=2)
    with jax.set_mesh(mesh):
        batch = jax.device_put(pair_batch, batch_sharding(mesh))
        text = jax.jit(lambda b: _microbatches(b, 2)).lower(batch).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_packed_equals_one_document_a_row(policy, params, plain):
    rng = np.random.default_rng(0)
    documents = [document(rng, 4, rng.integers(2, 7, 2), i, reference=True) for i in range(11)]
    alone = build_batch([[d] for d in documents], rows_per_step=16, tokens_per_row=T, documents_per_row=1, branches=2)
    assert_close(one_step(policy, params, alone), plain)


def test_shared_prompt_equals_copied_prompt(policy, params):
    """SFT on two linear documents = on one document with two branches, values and gradients."""
    rng = np.random.default_rng(3)
    pair = document(rng, 6, (5, 7), 0)
    linear = [
        Document(
            np.zeros(0, np.int32),
            (np.concatenate([pair.prompt, c]),),
            (np.concatenate([np.zeros(6, np.float32), w]),),
            i,
            pair.origin,
        )
        for i, (c, w) in enumerate(zip(pair.completions, pair.weights, strict=True))
    ]
    objective = lambda policy: sft_objective(policy, sft.nll, chunk=16)  # noqa: E731
    shape = {"rows_per_step": 1, "tokens_per_row": T, "documents_per_row": 2}
    shared = one_step(policy, params, build_batch([[pair]], **shape, branches=2), objective=objective)
    copied = one_step(policy, params, build_batch([linear], **shape, branches=0), objective=objective)
    assert_close(shared, copied)


def test_weights_do_not_cost_a_second_forward_pass(policy, params, pair_batch):
    """The pass that sums weights over the step is dead code but for the weights."""
    optimizer = optax.sgd(1.0)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0), None)

    def flops(function):
        return jax.jit(function).lower(state, None, pair_batch).compile().cost_analysis()["flops"]

    def bare(state, frozen, batch):
        def loss(params):
            terms, metrics = dpo(policy)(params, None, None, batch, state.key)
            return terms["dpo"].mean.value, metrics

        return jax.grad(loss, has_aux=True)(state.params)

    assert flops(make_train_step(dpo(policy), optimizer)) < 1.05 * flops(bare)


def test_accumulate_must_divide_the_rows(policy, params, pair_batch):
    with pytest.raises(ValueError, match="does not divide 8 rows"):
        one_step(policy, params, pair_batch, accumulate=3)


def test_first_dpo_loss_is_ln_2(policy, params, pair_batch):
    """With the policy as its own reference, live or cached."""
    live = lambda policy: preference_objective(  # noqa: E731
        policy,
        {"dpo": (1.0, functools.partial(preference.sigmoid, beta=0.3))},
        chunk=64,
        reference_logps=lambda frozen, carry, batch: token_logps_of(policy, frozen["reference"], batch, chunk=64),
    )
    optimizer = optax.sgd(0.0)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0), None)
    _, metrics = jax.jit(make_train_step(live(policy), optimizer))(state, {"reference": params}, pair_batch)
    np.testing.assert_allclose(metrics["loss"].value, np.log(2), atol=1e-6)
    assert metrics["rewards/margins"].weight == 11
