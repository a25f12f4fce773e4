"""Objectives of pairs against plain loops: sums of losses, LD-DPO, WPO, divergences, margins, and no reference."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpost
from jaxpost import config as configs
from jaxpost.data.rows import build_batch
from jaxpost.errors import ConfigError
from jaxpost.losses import preference
from jaxpost.ops.logprobs import TokenStats
from jaxpost.stages import dpo
from jaxpost.train.objectives import preference_losses, preference_objective
from jaxpost.types import Document, Origin
from tests.worlds import dpo_config, write_model, write_pairs


class Given:
    """A policy whose token statistics are its parameters: {"logps", "log_sum_sq_probs"}, [B, T] each."""

    config = types.SimpleNamespace(experts=None)

    def token_stats(self, params, batch, *, chunk, key=None):
        scored = (batch.rows.weights != 0).astype(jnp.float32)
        zeros = jnp.zeros_like(scored)
        logps, squares = params["logps"] * scored, params["log_sum_sq_probs"] * scored
        return TokenStats(logps, zeros, zeros, squares, zeros), None


def pair(rng, index):
    """A pair whose answers have an untrained token within, with a reference and scores."""
    lengths = rng.integers(3, 9, 2)
    draw = lambda n: rng.integers(1, 40, n).astype(np.int32)  # noqa: E731
    weights = [np.ones(n, np.float32) for n in lengths]
    weights[1][1] = 0
    reference = tuple(-rng.random(n).astype(np.float32) for n in lengths)
    completions, scores = tuple(map(draw, lengths)), (1 + rng.random(), rng.random())
    origin, token = Origin("pairs", index + 1), {"reference_logps": reference}
    return Document(draw(4), completions, tuple(weights), index, origin, token, {"score": scores})


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [pair(rng, index) for index in range(7)]


@pytest.fixture(scope="module")
def batch(documents):
    rows = [documents[:3], documents[3:4], documents[4:]]
    return build_batch(rows, rows_per_step=4, tokens_per_row=64, documents_per_row=3, branches=2)


@pytest.fixture(scope="module")
def params(batch):
    rng = np.random.default_rng(1)
    logps = -rng.random(batch.rows.tokens.shape).astype(np.float32)
    return {"logps": logps, "log_sum_sq_probs": 0.7 * logps}


def completions(values, batch):
    """[document in order][completion]: the trained values of each, by a loop over the rows."""
    rows, found = batch.rows, {}
    for b, t in np.ndindex(*rows.tokens.shape):
        if rows.weights[b, t] and rows.branches[b, t]:
            place = batch.example_ids[b, rows.segments[b, t] - 1], rows.branches[b, t] - 1
            found.setdefault(place, []).append(float(values[b, t]))
    return [[np.array(found[d, n]) for n in (0, 1)] for d in sorted({d for d, _ in found})]


def bound(**settings):
    hyperparameters = settings.pop("hyperparameters", {})
    values = {"stage": "dpo", "model": {"path": "m"}, "data": {"train": "d"}, "run": {"steps": 1}}
    return preference_losses(configs.resolve(values | {"loss": settings | hyperparameters}).loss)


def loss_of(losses, params, batch, **options) -> float:
    """The sum of the terms, as a step makes it."""
    terms, _ = jax.jit(preference_objective(Given(), losses, chunk=8, **options))(params, None, None, batch, None)
    return float(sum(term.coefficient * term.mean.value for term in terms.values()))


def nll_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def test_a_sum_of_losses(params, batch):
    """RPO: DPO per pair and, per token of the chosen answers, the negative log-likelihood."""
    losses = bound(name=["sigmoid", "sft"], weights=[1.0, 0.3], hyperparameters={"beta": 0.5})
    policy, reference = completions(params["logps"], batch), completions(batch.token["reference_logps"], batch)
    dpo = [
        nll_sigmoid(0.5 * ((w.sum() - rw.sum()) - (l.sum() - rl.sum())))
        for (w, l), (rw, rl) in zip(policy, reference, strict=True)
    ]
    nll = -np.concatenate([w for w, _ in policy]).mean()
    np.testing.assert_allclose(loss_of(losses, params, batch), np.mean(dpo) + 0.3 * nll, rtol=1e-5)


def test_ld_dpo_counts_what_is_beyond_the_shorter_answer_less(params, batch):
    policy, reference = completions(params["logps"], batch), completions(batch.token["reference_logps"], batch)
    expected = []
    for ours, theirs in zip(policy, reference, strict=True):
        shorter = min(map(len, ours))
        cut = lambda x, n=shorter: x[:n].sum() + 0.25 * x[n:].sum()  # noqa: E731
        (w, l), (rw, rl) = map(cut, ours), map(cut, theirs)
        expected.append(nll_sigmoid(0.5 * ((w - rw) - (l - rl))))
    losses = bound(hyperparameters={"beta": 0.5})
    np.testing.assert_allclose(loss_of(losses, params, batch, ld_alpha=0.25), np.mean(expected), rtol=1e-5)
    assert not math.isclose(loss_of(losses, params, batch), np.mean(expected), rel_tol=1e-3)


def test_wpo_weighs_pairs_by_how_likely_they_are(params, batch):
    policy, reference = completions(params["logps"], batch), completions(batch.token["reference_logps"], batch)
    squares, expected = completions(params["log_sum_sq_probs"], batch), []
    for ours, theirs, other in zip(policy, reference, squares, strict=True):
        (w, l), (rw, rl) = (map(np.sum, x) for x in (ours, theirs))
        weight = math.exp(sum((logps - square).mean() for logps, square in zip(ours, other, strict=True)))
        expected.append(weight * nll_sigmoid(0.5 * ((w - rw) - (l - rl))))
    losses = bound(hyperparameters={"beta": 0.5})
    np.testing.assert_allclose(loss_of(losses, params, batch, wpo=True), np.mean(expected), rtol=1e-5)


def test_a_divergence_is_that_of_the_losses_that_know_one(params, batch):
    policy, reference = completions(params["logps"], batch), completions(batch.token["reference_logps"], batch)
    shape = lambda x: math.log(2 * math.exp(x) / (1 + math.exp(x)))  # noqa: E731
    expected = [
        nll_sigmoid(0.5 * (shape(w.sum() - rw.sum()) - shape(l.sum() - rl.sum())))
        for (w, l), (rw, rl) in zip(policy, reference, strict=True)
    ]
    losses = bound(name=["sigmoid", "sft"], weights=[1.0, 0.0], hyperparameters={"beta": 0.5})
    value = loss_of(losses, params, batch, divergence="js_divergence")
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)


def test_margins_come_from_the_scores(params, batch, documents):
    policy, reference = completions(params["logps"], batch), completions(batch.token["reference_logps"], batch)
    expected = []
    for (w, l), (rw, rl), document in zip(policy, reference, documents, strict=True):
        offset = math.log(np.subtract(*document.completion["score"]))
        expected.append(nll_sigmoid(0.5 * ((w.sum() - rw.sum()) - (l.sum() - rl.sum())) - offset))
    losses = bound(name="odpo", hyperparameters={"beta": 0.5})
    np.testing.assert_allclose(loss_of(losses, params, batch), np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(preference.LOSSES))
def test_no_gradient_comes_from_the_reference_or_empty_places(name, params, batch):
    """Every loss by its name: finite gradients, none at what is not trained."""
    objective = preference_objective(Given(), bound(name=name), chunk=8)

    def total(params):
        terms, _ = objective(params, None, None, batch, None)
        return sum(term.coefficient * term.mean.value for term in terms.values())

    value, grads = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value) and np.isfinite(grads["logps"]).all() and np.any(grads["logps"])
    assert not np.any(grads["logps"][batch.rows.weights == 0]) and not np.any(grads["log_sum_sq_probs"])


def test_mean_rewards_are_logged_where_the_loss_compares_means(params, batch):
    policy = completions(params["logps"], batch)
    objective = jax.jit(preference_objective(Given(), bound(name="simpo"), chunk=8))
    _, metrics = objective(params, None, None, batch, None)
    np.testing.assert_allclose(metrics["rewards/chosen"].value, np.mean([2.0 * w.mean() for w, _ in policy]), rtol=1e-5)


FIRST_LOSS = {  # at policy = reference, where r = 0, whatever beta
    **dict.fromkeys(["sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"], math.log(2)),
    **dict.fromkeys(["nca_pair", "bco_pair"], 2 * math.log(2)),
    **dict.fromkeys(["hinge", "apo_zero", "apo_down"], 1.0),
    "ipo": 25.0,  # (1 / (2 * 0.1))^2
    "sppo_hard": 50.0,
    "discopop": (math.log(2) + 1) / 2,
    "exo_pair": 0.5 * (math.log(0.5) - math.log(1 - 1e-3)) + 0.5 * (math.log(0.5) - math.log(1e-3)),
}


@pytest.mark.parametrize("name", FIRST_LOSS)
def test_the_first_loss_is_known(name, params, batch):
    """Step-0 identities: of a policy that is its own reference, rewards and margins are 0."""
    itself = lambda frozen, carry, batch: frozen["logps"]  # noqa: E731
    objective = preference_objective(Given(), bound(name=name), chunk=8, reference_logps=itself)
    given = {"logps": jnp.asarray(params["logps"]), "log_sum_sq_probs": params["log_sum_sq_probs"]}
    if name == "aot_unpaired":  # it compares log-ratios of different pairs: all of them are 0
        given["logps"] = given["logps"] * 0
    terms, metrics = jax.jit(objective)(given, given, None, batch, None)
    np.testing.assert_allclose(terms[name].mean.value, FIRST_LOSS[name], rtol=1e-5)
    assert float(metrics["rewards/margins"].value) == 0


def test_every_loss_against_a_reference_has_a_first_loss():
    reading = {name for name, loss in preference.LOSSES.items() if loss.traits.reads_reference}
    assert reading == {*FIRST_LOSS, "odpo"}  # odpo's depends on the scores


# --- from a config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"name": "sigmoyd"}, "loss.name: no loss 'sigmoyd'; there are sigmoid,"),
        ({"name": ["sigmoid", "ipo"], "gamma": 1.0}, "loss.gamma: sigmoid and ipo takes beta, label_smoothing"),
        ({"beta": "strong"}, "loss.beta: expected a number, got 'strong'"),
        ({"beta": True}, "loss.beta: expected a number, got True"),
        ({"name": "odpo", "log_offset": 1}, "loss.log_offset: expected True or False, got 1"),
        ({"name": "nca_pair", "divergence": "forward_kl"}, "loss.divergence: forward_kl, but nca_pair knows none;"),
        ({"name": "simpo", "divergence": "forward_kl"}, "loss.divergence: forward_kl, but simpo knows none;"),
        ({"weights": [1, 2]}, "loss.weights: 2 for the 1 losses of loss.name; give one each"),
        ({"name": ["ipo", "ipo"]}, "loss.name: ipo, ipo: one of them stands twice"),
        ({"name": []}, "loss.name: expected a name, got an empty list"),
        ({"divergence_alpha": 0.3}, "loss.divergence_alpha: 0.3, but loss.divergence is 'reverse_kl'"),
    ],
)
def test_what_is_wrong_is_said_by_key(settings, said):
    with pytest.raises(ConfigError) as caught:
        bound(**settings)
    assert str(caught.value).startswith(said)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return write_model(folder / "model"), write_pairs(folder / "pairs.jsonl")


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "orpo"},
        {"stage": "simpo", "loss": {"name": ["simpo", "sft"], "weights": [1.0, 0.1]}},
        {"loss": {"name": "cpo", "wpo": True, "ld_alpha": 0.5}},
    ],
)
def test_without_a_reference_nothing_of_it_is_computed(given, tmp_path, monkeypatch, changes):
    """No second policy, and no values of it: a batch that held none would end the step."""
    refuse = lambda *_: pytest.fail("a reference was opened")  # noqa: E731
    monkeypatch.setattr(dpo, "attach_reference", refuse)
    config = dpo_config(*given, tmp_path / "run", steps=2) | changes
    run = jaxpost.run(config)
    assert np.isfinite(run.metrics["loss"][:, 1]).all() and run.state.carry is None
    assert ("loss/sft" in run.metrics) == (changes.get("stage") == "simpo")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"stage": "orpo", "loss": {"name": "ipo"}}, "loss.name: ipo reads a reference, and the stage orpo has none"),
        ({"loss": {"name": "simpo"}, "reference": {"mode": "live"}}, "reference: simpo reads no reference"),
    ],
)
def test_stage_and_reference_fit_the_loss(given, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        jaxpost.run(dpo_config(*given, tmp_path / "run") | changes)


def test_a_new_loss_is_ten_lines_and_one_of_the_config(given, tmp_path, monkeypatch):
    """Nothing of the package is touched: a module of the user's own, and loss.name."""
    (tmp_path / "my_losses.py").write_text(
        '''"""A loss of my own."""
import jax.numpy as jnp

from jaxpost.losses.pairs import implicit_rewards


def squared(policy, reference, *, beta: float = 0.1, target: float = 2.0):
    """(h - target)^2: the margin of the rewards is drawn to a target."""
    chosen, rejected = implicit_rewards(policy, reference, beta=beta)
    return jnp.square(chosen - rejected - target)
'''
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = dpo_config(*given, tmp_path / "run", steps=3)
    config["loss"] = {"name": "my_losses:squared", "target": 3.0}
    run = jaxpost.run(config)
    np.testing.assert_allclose(run.metrics["loss"][0, 1], 9.0, atol=1e-4)
    assert run.metrics["loss"][-1, 1] < 9.0
