"""Distillation: the objective against a dense loop, teachers that are stored against live ones, whole runs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpost
from jaxpost import cli
from jaxpost.data.rows import build_batch
from jaxpost.errors import ConfigError, DataError
from jaxpost.losses import distill
from jaxpost.models.policy import Policy
from jaxpost.sharding import batch_sharding, make_mesh, named_shardings
from jaxpost.train.distill import IDS, LOGPS, distill_objective, likeliest, live_teacher, stored_teacher
from jaxpost.train.step import make_train_step
from jaxpost.types import Batch, Document, Origin, TrainState
from tests.models.tiny import linear_rows, random_params, tiny_config
from tests.train.test_data import write_answers
from tests.worlds import write_model

V, TEMPERATURE = 48, 1.7


@pytest.fixture(scope="module")
def models():
    """A student, and a teacher of another width whose table is padded; ((policy, params), (policy, params))."""
    student, teacher = Policy(tiny_config(num_layers=1)), Policy(tiny_config(num_layers=1, embed_dim=24, vocab_size=52))
    return (student, random_params(student)), (teacher, random_params(teacher, seed=1))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two rows of two documents, the second shorter, with an untrained beginning."""
    rng = np.random.default_rng(0)

    def document(length, index):
        tokens, weights = rng.integers(3, V, length).astype(np.int32), np.ones(length, np.float32)
        weights[: length // 3] = 0
        return Document(np.zeros(0, np.int32), (tokens,), (weights,), index, Origin("test", index + 1))

    rows = [[document(9, 0), document(6, 1)], [document(7, 2)]]
    return build_batch(rows, rows_per_step=2, tokens_per_row=20, documents_per_row=2, branches=0)


def dense(models, batch, loss, params=None, top_k=None):
    """The mean over trained tokens of a loop over documents, each alone in a row, with all logits at once."""
    (student, own), (teacher, theirs) = models
    params, total, count = own if params is None else params, 0.0, 0.0
    rows = batch.rows
    for row in range(2):
        for segment in (1, 2):
            at = np.asarray(rows.segments[row]) == segment
            if not at.any():
                continue
            alone, weights = linear_rows([rows.tokens[row][at]], 20), rows.weights[row][at]
            of = lambda policy, p: policy.hidden(p, alone)[0][0] @ policy.head(p).weight.T  # noqa: B023, E731
            q, p = (jax.nn.log_softmax(z[:, :V] / TEMPERATURE) for z in (of(student, params), of(teacher, theirs)))
            if top_k is not None:
                ids = jnp.argsort(-p, axis=-1)[:, :top_k]
                q, p = (distill.with_rest(jnp.take_along_axis(x, ids, axis=-1)) for x in (q, p))
            for t in range(1, int(at.sum())):
                total += weights[t] * loss(q[t - 1], p[t - 1])
                count += weights[t]
    return total / count


def objective(models, loss, *, top_k=None, chunk=8, nll_weight=0.0, stored=False):
    (student, _), (teacher, theirs) = models
    options = {"temperature": TEMPERATURE, "top_k": top_k}
    told = stored_teacher(V, **options) if stored else live_teacher(teacher, theirs, **options)
    return distill_objective(student, loss, told, nll_weight=nll_weight, chunk=chunk), told.frozen


def value_and_grad(models, batch, loss, **options):
    fn, frozen = objective(models, loss, **options)

    def total(params):
        terms, metrics = fn(params, frozen, None, batch, jax.random.key(0))
        return sum(term.coefficient * term.mean.value for term in terms.values()), metrics

    return jax.jit(jax.value_and_grad(total, has_aux=True))(models[0][1])


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "loss, top_k",
    [(distill.forward_kl, None), (functools.partial(distill.jsd, beta=0.3), None), (distill.reverse_kl, 5)],
    ids=["forward", "jsd", "reverse of the top 5"],
)
def test_the_objective_equals_a_dense_loop(models, batch, loss, top_k):
    """Packed, in chunks, with a padded table of the teacher; values and gradients of every parameter."""
    wanted = jax.jit(jax.value_and_grad(lambda params: dense(models, batch, loss, params, top_k)))(models[0][1])
    (value, metrics), grads = value_and_grad(models, batch, loss, top_k=top_k)
    assert_close((value, grads), wanted)
    np.testing.assert_allclose(metrics["divergence"].value, value, rtol=1e-6)


def test_the_top_of_all_tokens_is_all_tokens(models, batch):
    (whole, _), grads = value_and_grad(models, batch, distill.forward_kl)
    (top, _), top_grads = value_and_grad(models, batch, distill.forward_kl, top_k=V)
    assert_close((top, top_grads), (whole, grads))


def test_eight_devices_equal_one(models, batch):
    """Student and teacher split over rows, hidden size and vocabulary."""
    fn, frozen = objective(models, distill.forward_kl, top_k=5)
    (student, own), (teacher, _) = models

    def total(params, frozen, batch):
        terms, _ = fn(params, frozen, None, batch, jax.random.key(0))
        return terms["divergence"].mean.value

    mesh = make_mesh(fsdp=2, tensor=4)
    at, teacher_at = (named_shardings(policy.axes(), mesh, policy.abstract()) for policy in (student, teacher))
    with jax.set_mesh(mesh):
        placed = jax.device_put((own, frozen, batch), (at, {"teacher": teacher_at}, batch_sharding(mesh)))
        found = jax.jit(jax.value_and_grad(total))(*placed)
    (wanted, _), grads = value_and_grad(models, batch, distill.forward_kl, top_k=5)
    assert_close(found, (wanted, grads))


def with_outputs(models, batch, top_k) -> Batch:
    _, (teacher, theirs) = models
    options = {"vocab_size": V, "temperature": TEMPERATURE, "top_k": top_k, "chunk": 8}
    ids, logps = jax.jit(lambda params, batch: likeliest(teacher, params, batch, **options))(theirs, batch)
    return Batch(batch.rows, {IDS: ids, LOGPS: logps}, batch.completion, batch.example_ids)


def test_a_stored_teacher_says_what_the_live_one_says(models, batch):
    """Also where fewer of the stored tokens are used; and the data's NLL is added by its weight."""
    stored = with_outputs(models, batch, 6)
    for options in ({"top_k": 6, "nll_weight": 0.5}, {"top_k": 4}):
        live = value_and_grad(models, batch, distill.forward_kl, **options)
        assert_close(value_and_grad(models, stored, distill.forward_kl, **options, stored=True), live)
    (loss, metrics), _ = value_and_grad(models, batch, distill.forward_kl, top_k=6, nll_weight=0.5)
    np.testing.assert_allclose(loss, metrics["divergence"].value + 0.5 * metrics["nll"].value, rtol=1e-6)


def test_a_teacher_that_is_the_student_gives_neither_loss_nor_gradient(models, batch):
    same = (models[0], models[0])
    for top_k in (None, 5):
        (loss, _), grads = value_and_grad(same, batch, functools.partial(distill.jsd, beta=0.5), top_k=top_k)
        np.testing.assert_allclose(loss, 0, atol=1e-6)
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-6


def test_a_step_holds_no_array_of_all_logits_of_student_or_teacher(models, batch):
    fn, frozen = objective(models, distill.forward_kl, chunk=8)
    optimizer, (_, params) = optax.sgd(1.0), models[0]
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0), None)
    text = jax.jit(make_train_step(fn, optimizer)).lower(state, frozen, batch).compile().as_text()
    for size in (V, 52):
        assert f"f32[8,{size}]" in text
        assert f"[2,20,{size}]" not in text and f"[40,{size}]" not in text


# ---- runs ----


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    student, teacher = write_model(folder / "student", num_layers=1), write_model(folder / "teacher", seed=1)
    return student, teacher, write_answers(folder / "a.jsonl", 24)


def distill_config(given, run_dir, **teacher) -> dict:
    student, path, data = given
    return {
        "stage": "distill",
        "model": {"path": str(student)},
        "teacher": {"path": str(path), **teacher},
        "data": {"train": str(data), "eval_examples": 6, "max_dropped": 0.5},
        "batch": {"rows_per_step": 8, "tokens_per_row": 64, "documents_per_row": 2},
        "optimizer": {"learning_rate": 1e-2},
        "run": {"dir": str(run_dir), "steps": 4, "eval_prompts": 0, "log_to": (), "export": False},
    }


def teach(config: dict, tmp_path, *arguments) -> int:
    (tmp_path / "tiny.py").write_text(f"def get_config():\n    return {config!r}\n")
    return cli.main(["teach", f"--config={tmp_path / 'tiny.py'}", f"--to={tmp_path / 'outputs'}", *arguments])


def test_a_run_from_stored_outputs_equals_one_with_the_teacher(given, tmp_path, capsys):
    live = jaxpost.run(distill_config(given, tmp_path / "live", top_k=8))
    assert teach(distill_config(given, tmp_path / "none", top_k=8), tmp_path) == 0
    assert capsys.readouterr().out.strip().endswith("outputs")
    config = distill_config(given, tmp_path / "stored", outputs=str(tmp_path / "outputs"))
    config["teacher"]["path"] = None
    stored = jaxpost.run(config)
    for ours, theirs in zip(stored.rows, live.rows, strict=True):
        for name in ("loss", "nll", "grad_norm", "eval/loss", "eval/divergence"):
            assert (name in ours) == (name in theirs)
            np.testing.assert_allclose(ours.get(name, 0), theirs.get(name, 0), rtol=1e-4, err_msg=name)
    losses = [row["loss"] for row in live.rows if "loss" in row]
    assert losses[-1] < losses[0]
    refused = [
        (lambda c: c["teacher"].update(temperature=2.0), ConfigError, r"teacher\.temperature: 2\.0, but .* at 1\.0"),
        (lambda c: c["teacher"].update(top_k=9), ConfigError, r"teacher\.top_k: 9, but .* holds 8 tokens"),
        (lambda c: c["teacher"].update(path=str(given[0])), ConfigError, r"teacher\.path: not the teacher of"),
        (lambda c: c["run"].update(seed=3), DataError, r"teacher\.json: made for other data than .*\(seed differ\)"),
        (
            lambda c: c["teacher"].update(outputs="x"),
            DataError,
            r"teacher\.outputs: no x/teacher\.json; `jaxpost",
        ),
    ]
    for change, error, words in refused:
        other = json.loads(json.dumps(config | {"run": config["run"] | {"dir": str(tmp_path / "other")}}))
        change(other)
        with pytest.raises(error, match=words):
            jaxpost.run(other)
    (tmp_path / "outputs" / "train.ids").write_bytes((tmp_path / "outputs" / "eval.ids").read_bytes()[:-4])
    with pytest.warns(UserWarning, match="not used"), pytest.raises(DataError, match=r"train\.ids: missing, cut short"):
        jaxpost.run(config | {"run": config["run"] | {"dir": str(tmp_path / "other")}})


def test_a_teacher_of_another_vocabulary_is_refused_by_name(given, tmp_path):
    student, _, data = given
    other = write_model(tmp_path / "swapped")
    values = json.loads((other / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary[700], vocabulary[701] = vocabulary[701], vocabulary[700]
    (other / "tokenizer.json").write_text(json.dumps(values))
    small = write_model(tmp_path / "small", vocab_size=1000)
    for path, words in (
        (other, r"teacher\.path: token 700 is '.+', but '.+' in model\.path; both need the same"),
        (small, r"teacher\.path: .* tokens, but model\.path .*; a teacher must know all words of its student"),
    ):
        with pytest.raises(ConfigError, match=words):
            jaxpost.run(distill_config((student, path, data), tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"teacher\.top_k: 5000, but the vocabulary has \d+ tokens"):
        jaxpost.run(distill_config(given, tmp_path / "run", top_k=5000))


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--config.teacher.top_k=None"], "teacher.top_k: missing; how many likely tokens to keep"),
        (
            ["--config.teacher.path=None", "--config.teacher.outputs=x"],
            "teacher.path: the teacher to ask must be",
        ),
        (["--config.stage=sft", "--config.teacher.path=None"], "teacher.top_k: the stage sft has no teacher"),
    ],
)
def test_wrong_flags_of_teach_are_one_line(given, tmp_path, arguments, line, capsys):
    assert teach(distill_config(given, tmp_path / "none", top_k=8), tmp_path, *arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
