"""Reward models: objective, heads, normalisation, whole runs, files, and bad input."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpost
from jaxpost import config as configs
from jaxpost.data.rows import build_batch
from jaxpost.errors import ConfigError, DataError
from jaxpost.losses import reward
from jaxpost.models.policy import Policy
from jaxpost.sharding import make_mesh
from jaxpost.train import setup
from jaxpost.train.objectives import bind_loss
from jaxpost.train.reward import head_weights, process_objective, ranking_loss, reward_objective, taken
from jaxpost.train.run import load_model
from jaxpost.train.scores import Scores, completion_scores, joined, normalization, normalized
from jaxpost.types import Document, Origin
from tests.models.tiny import random_params, tiny_config
from tests.worlds import write_model, write_pairs

RNG = np.random.default_rng(0)
PAIR_LOSS, RANKING_LOSS = reward.bradley_terry, reward.all_pairs


def ranking(completions: int, example_id: int = 0, prompt: int = 5, scores=None) -> Document:
    tokens = lambda n: RNG.integers(4, 48, n).astype(np.int32)  # noqa: E731
    answers = tuple(tokens(3 + n % 2) for n in range(completions))
    given = tuple(map(float, scores or range(completions)[::-1]))
    weights = tuple(np.ones(len(a), np.float32) for a in answers)
    return Document(tokens(prompt), answers, weights, example_id, Origin("file", 1), completion={"score": given})


def batch_of(rows, branches, tokens_per_row=128):
    shape = {"rows_per_step": len(rows), "tokens_per_row": tokens_per_row, "documents_per_row": 4}
    return build_batch(rows, **shape, branches=branches)


@pytest.fixture(scope="module")
def scored():
    policy = Policy(tiny_config(num_scores=3))
    return policy, random_params(policy)


def loss_of(objective, params, batch):
    terms, metrics = jax.jit(objective)(params, None, None, batch, None)
    return float(terms["reward"].mean.value), {name: float(mean.value) for name, mean in metrics.items()}


# ---- objective ----


def test_rankings_with_a_shared_prompt_score_as_sequences_of_their_own(scored):
    """Each completion of packed rankings gets the score that its prompt and it get alone in a row, at the end."""
    policy, params = scored
    documents = [ranking(4), ranking(2, prompt=1), ranking(3)]
    batch = batch_of([documents[:2], documents[2:]], branches=4)
    scores, _ = jax.jit(completion_scores, static_argnums=0)(policy, params, batch)
    score = jax.jit(lambda rows: policy.scores(params, policy.hidden(params, rows)[0]))
    for (row, place), document in zip([(0, 0), (0, 1), (1, 0)], documents, strict=True):
        for n, completion in enumerate(document.completions):
            whole = np.concatenate([document.prompt, completion])[None]
            ones = np.ones_like(whole)
            alone = type(batch.rows)(whole, ones, 0 * ones, np.arange(whole.size)[None], ones.astype(np.float32))
            np.testing.assert_allclose(scores[row, place, n], score(alone)[0, -1], atol=1e-5)
        assert not np.any(scores[row, place, len(document.completions) :])


def test_pair_losses_equal_a_loop(scored):
    """Value, weighting by heads, margin by the data's distance, and TRL's metrics."""
    policy, params = scored
    documents = [ranking(2, n, scores=(1.0 + n, 0.5)) for n in range(3)]
    batch = batch_of([documents[:2], documents[2:]], branches=2)
    scores = np.asarray(jax.jit(completion_scores, static_argnums=0)(policy, params, batch)[0])
    scores = [scores[0, 0], scores[0, 1], scores[1, 0]]  # [N, R] each
    objective = reward_objective(policy, PAIR_LOSS, branches=2, margin=0.3, bootstrap_seed=7)
    found, metrics = loss_of(objective, params, batch)
    weights = np.asarray(head_weights(np.arange(3)[None], 3, 7))[0]
    losses = [
        np.log1p(np.exp(-(s[0] - s[1] - 0.3 * (d.completion["score"][0] - 0.5))))
        for s, d in zip(scores, documents, strict=True)
    ]
    np.testing.assert_allclose(found, (np.array(losses) * weights).sum() / weights.sum(), rtol=1e-5)
    means = [s.mean(-1) for s in scores]
    np.testing.assert_allclose(metrics["accuracy"], np.mean([m[0] > m[1] for m in means]), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], np.mean([m[0] - m[1] for m in means]), rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_reward"], np.mean(means), rtol=1e-4)
    np.testing.assert_allclose(metrics["min_reward"], np.min(means), rtol=1e-5)
    np.testing.assert_allclose(metrics["max_reward"], np.max(means), rtol=1e-5)
    np.testing.assert_allclose(metrics["spread"], np.mean([s.std(-1) for s in scores]), rtol=1e-5)


@pytest.mark.parametrize("name", ["all_pairs", "plackett_luce"])
def test_a_ranking_of_two_is_a_pair(scored, name):
    policy, params = scored
    batch = batch_of([[ranking(2), ranking(2)]], branches=2)
    pair, _ = loss_of(reward_objective(policy, PAIR_LOSS, branches=2), params, batch)
    found, _ = loss_of(reward_objective(policy, reward.LOSSES[name], branches=2), params, batch)
    np.testing.assert_allclose(found, pair, rtol=1e-6)


@pytest.mark.parametrize("name", ["all_pairs", "plackett_luce", "regression"])
def test_rankings_of_several_lengths_equal_one_at_a_time(scored, name):
    """What is packed beside a ranking, and the places that it leaves empty, change nothing."""
    policy, params = scored
    documents, loss = [ranking(4), ranking(2), ranking(3)], reward.LOSSES[name]
    together, _ = loss_of(reward_objective(policy, loss, branches=4), params, batch_of([documents], branches=4))
    alone, counts = [], []
    for document in documents:
        most = len(document.completions)
        objective = reward_objective(policy, loss, branches=most)
        alone.append(loss_of(objective, params, batch_of([[document]], branches=most))[0])
        counts.append(most if name == "regression" else 1)  # a mean over completions, or over rankings
    np.testing.assert_allclose(together, np.average(alone, weights=counts), rtol=1e-5)


def test_a_fresh_zero_head_begins_at_ln_2():
    policy = Policy(tiny_config(num_scores=1))
    params = random_params(policy)
    params["score"]["weight"] = jnp.zeros_like(params["score"]["weight"])
    batch = batch_of([[ranking(2), ranking(2)]], branches=2)
    assert loss_of(reward_objective(policy, PAIR_LOSS, branches=2), params, batch)[0] == pytest.approx(math.log(2))
    batch = batch_of([[ranking(4)]], branches=4)
    objective = reward_objective(policy, reward.plackett_luce, branches=4)
    assert loss_of(objective, params, batch)[0] == pytest.approx(math.log(24))


def test_no_gradient_reaches_a_head_from_examples_that_it_does_not_learn_from(scored):
    policy, params = scored
    document = ranking(2, example_id=5)
    batch, seed = batch_of([[document]], branches=2), 3
    weights = np.asarray(head_weights(batch.example_ids[:, :1], 3, seed))[0, 0]
    assert set(weights.tolist()) == {0.0, 2.0}  # of this seed: some heads learn from it and some do not
    objective = reward_objective(policy, PAIR_LOSS, branches=2, bootstrap_seed=seed)
    grads = jax.jit(jax.grad(lambda p: objective(p, None, None, batch, None)[0]["reward"].mean.total))(params)
    learns = np.abs(np.asarray(grads["score"]["weight"])).max(axis=1) > 0
    np.testing.assert_array_equal(learns, weights > 0)


def test_heads_learn_from_halves_of_their_own():
    weights = np.asarray(head_weights(np.arange(4000)[None], 4, seed=0))[0]
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.06)
    np.testing.assert_allclose(np.corrcoef(weights.T), np.eye(4), atol=0.06)
    again = np.asarray(head_weights(np.arange(4000)[::-1].copy()[None], 4, seed=0))[0]
    np.testing.assert_array_equal(again[::-1], weights)  # by the example, wherever it stands


def test_what_a_loss_takes_is_held_against_what_rankings_hold(scored):
    assert taken(RANKING_LOSS) == ("rewards", "mask", "scores")
    with pytest.raises(ConfigError, match=r"loss\.name: the loss takes 'labels'; rankings .* hold rewards, mask, sc"):
        taken(lambda rewards, labels: rewards)
    with pytest.raises(ConfigError, match=r"loss\.name: a loss of pairs, but the data have rankings of 4; set all_p"):
        reward_objective(scored[0], PAIR_LOSS, branches=4)


def test_ties_in_the_data_are_no_pairs():
    """Of scores 1, 0, 0 only two pairs count, whatever the model says of the third."""
    scores = jnp.array([[2.0], [1.0], [5.0]])
    given, mask = jnp.array([1.0, 0.0, 0.0]), jnp.ones(3)
    mean = ranking_loss(RANKING_LOSS, taken(RANKING_LOSS), scores, given, mask, jnp.ones(1), 0.0)
    expected = (np.log1p(np.exp(-1)) + np.log1p(np.exp(3))) / 2
    np.testing.assert_allclose(mean.value, expected, rtol=1e-6)


# ---- scores and their normalisation ----


def test_normalised_scores_have_mean_0_and_spread_1():
    scores = RNG.normal(3, 2, (200, 1)) + RNG.normal(0, 1, (200, 3)) * [1, 2, 3]
    norm = normalization(scores)
    heads = normalized(scores, norm)
    np.testing.assert_allclose(heads.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(Scores(heads).mean.std(), 1, rtol=1e-5)
    np.testing.assert_allclose(heads.std(0), heads.std(0)[0], rtol=1e-4)  # every head counts alike
    assert normalization(np.ones((5, 2))) == ()
    np.testing.assert_array_equal(normalized(scores, ()), scores)


def test_an_ensemble_of_models_is_one_of_their_heads():
    both = joined([Scores(np.array([[1.0], [2.0]])), Scores(np.array([[3.0], [2.0]]))])
    np.testing.assert_array_equal(both.mean, [2, 2])
    np.testing.assert_array_equal(both.min, [1, 2])
    np.testing.assert_array_equal(both.spread, [1, 0])


# ---- whole runs ----


def reward_config(model, train, run_dir, heads=2, **run) -> dict:
    return {
        "stage": "reward",
        "model": {"path": str(model), "score_heads": heads},
        "data": {"train": str(train), "eval_examples": 10},
        "batch": {"rows_per_step": 8, "tokens_per_row": 256, "documents_per_row": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "run": {"dir": str(run_dir), "steps": 4, "eval_prompts": 2, "log_to": (), **run},
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return write_model(folder / "model"), write_pairs(folder / "pairs.jsonl")


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):
    return jaxpost.run(reward_config(*given, tmp_path_factory.mktemp("reward") / "run", checkpoint_every=2))


@pytest.fixture(scope="module")
def on_one_device(given, tmp_path_factory):
    """The metrics of a run of one head on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
        run = jaxpost.run(reward_config(*given, tmp_path_factory.mktemp("one") / "run", heads=1, export=False))
    assert run.mesh.size == 1
    return run.metrics


SLOW_MESHES = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ({"data": 8, "fsdp": 1}, {"fsdp": 8})]


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, *SLOW_MESHES])
def test_the_stage_begins_at_ln_2_on_every_mesh(given, on_one_device, tmp_path, sizes):
    """And goes on alike: the losses of one device and of eight, before, in and after training."""
    config = reward_config(*given, tmp_path / "run", heads=1, export=False)
    found = jaxpost.run(config | {"mesh": sizes}).metrics
    for name in ("loss", "eval/loss"):
        np.testing.assert_allclose([found[name][0, 1], on_one_device[name][0, 1]], math.log(2), atol=1e-6)
        np.testing.assert_allclose(found[name], on_one_device[name], atol=1e-5)
    assert found["loss"][-1, 1] < math.log(2) - 1e-3


QUESTION, ANSWERS = "What is the capital of Chile?", ["The capital of Chile is Santiago.", "Rome."]


def test_run_checkpoint_and_export_score_alike(run):
    """Normalised by the held-out pairs, from the run itself, its newest checkpoint and its export."""
    found = run.score(QUESTION, ANSWERS).heads
    assert found.shape == (2, 2) and np.ptp(found) > 0
    assert len(run.model.policy.config.score_norm) == 2
    for path in (run.folder, run.folder / "export"):
        loaded = jaxpost.load(path)
        assert loaded.model.policy.config.score_norm == run.model.policy.config.score_norm
        np.testing.assert_allclose(loaded.score(QUESTION, ANSWERS).heads, found, atol=1e-5)
    exported = json.loads((run.folder / "export" / "config.json").read_text())
    assert exported["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("kind", ["run", "export"])
def test_a_frozen_model_is_held_in_the_type_it_computes_in(run, kind, monkeypatch):
    path, mesh = str(run.folder / {"run": "", "export": "export"}[kind]), make_mesh(data=2, fsdp=4)
    monkeypatch.setattr(setup, "compute_dtype", lambda name, mesh: "bfloat16")
    loaded = load_model(path, mesh=mesh, frozen=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"} and loaded.mesh is mesh
    half, whole = loaded.score(QUESTION, ANSWERS).heads, run.score(QUESTION, ANSWERS).heads
    np.testing.assert_allclose(half, whole, atol=0.05 * np.ptp(whole))


def test_scores_of_text_are_those_of_its_tokens(run):
    messages = [{"role": "user", "content": QUESTION}]
    for answer in ANSWERS:
        whole = [*messages, {"role": "assistant", "content": answer}]
        tokens = run.model.template.encode(whole, run.model.tokenizer)
        np.testing.assert_allclose(run.score_tokens([tokens]).heads, run.score(messages, [answer]).heads, atol=1e-5)


def test_scores_of_tokens_do_not_depend_on_company(run):
    """One at a time or all at once, of one token or as many as the model reads; nothing gives nothing."""
    most = run.model.policy.config.max_positions
    sequences = [RNG.integers(4, 900, size) for size in (1, 2, 9, 40, most)]
    together = run.score_tokens(sequences).heads
    for tokens, expected in zip(sequences, together, strict=True):
        np.testing.assert_allclose(run.score_tokens([tokens]).heads[0], expected, atol=1e-4)
    assert run.score_tokens([]).heads.shape == (0, 2)
    with pytest.raises(DataError, match=rf"sequence 2: {most + 1} tokens; the model scores 1 to {most}"):
        run.score_tokens([[5], [5] * (most + 1)])


def test_a_run_on_a_reward_model_goes_on_with_its_heads(run, given, tmp_path):
    config = reward_config(run.folder / "export", given[1], tmp_path / "run", heads=None, steps=2)
    again = jaxpost.run(config)
    assert again.model.policy.config.num_scores == 2
    config["run"]["dir"], config["model"]["score_heads"] = str(tmp_path / "other"), 3
    with pytest.raises(ConfigError, match=r"model\.score_heads: 3, but model\.path has 2; set None"):
        jaxpost.run(config)


def test_a_finished_run_gone_on_with_has_the_same_scores(run, given, tmp_path):
    """The normalisation is the checkpoint's; no step is left to be done."""
    shutil.copytree(run.folder, tmp_path / "run")
    again = jaxpost.run(reward_config(*given, tmp_path / "run", checkpoint_every=2, resume=True))
    np.testing.assert_array_equal(again.score(QUESTION, ANSWERS).heads, run.score(QUESTION, ANSWERS).heads)


def test_a_reward_model_gives_no_words(run):
    with pytest.raises(ConfigError, match="scores for a head, not words"):
        run.chat("Hello?")


def test_a_language_model_gives_no_scores(given):
    with pytest.raises(ConfigError, match="words for a head, not scores"):
        jaxpost.load(given[0]).score_tokens([[5, 6]])


# ---- rankings from files, and bad input ----


def write_rankings(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


GOOD = [
    {"prompt": f"How is {n} written?", "completions": [f"It is {n}.", f"It is {n + 1}.", "No.", "Who knows it?"][:size]}
    for n, size in zip(range(40), [4, 2, 3, 4] * 10, strict=True)
]
BAD = [
    ({"prompt": "Why?", "completions": ["One."]}, "single_completion"),
    ({"prompt": "Why?", "completions": ["One.", "Two."], "scores": [float("nan"), 1.0]}, "bad_scores"),
    ({"prompt": "Why?", "completions": ["One.", "Two."], "scores": [1.0, 1.0]}, "tie"),
    ({"prompt": "Why?", "completions": ["One.", "One."]}, "equal_completions"),
]


def test_rankings_train_and_bad_ones_are_counted(given, tmp_path, capsys):
    path = write_rankings(tmp_path / "r.jsonl", [*GOOD, *(record for record, _ in BAD)])
    config = reward_config(given[0], path, tmp_path / "run", heads=1, steps=8, export=False)
    config |= {"loss": {"name": "plackett_luce"}}
    losses = jaxpost.run(config).metrics["loss"][:, 1]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    printed = capsys.readouterr().out
    assert all(reason in printed for _, reason in BAD)


@pytest.mark.parametrize("name", reward.LOSSES)
def test_the_shipped_config_takes_every_loss(name):
    """A hyperparameter of it that a loss does not take is set None, on the command line too."""
    values = configs.load("reward")
    configs.override(values, "loss.name", name)
    if name not in ("bradley_terry", "all_pairs"):
        with pytest.raises(ConfigError, match=rf"loss\.label_smoothing: {name} takes no hyperparameters; set None"):
            bind_loss(configs.resolve(values).loss, reward.LOSSES)
        configs.override(values, "loss.label_smoothing", "None")
    assert bind_loss(configs.resolve(values).loss, reward.LOSSES).func is reward.LOSSES[name]


def test_a_longer_ranking_than_the_config_says_is_refused(given, tmp_path):
    config = reward_config(given[0], write_rankings(tmp_path / "r.jsonl", GOOD), tmp_path / "run")
    config["batch"]["completions"] = 3
    config["loss"] = {"name": "all_pairs"}
    with pytest.raises(ConfigError, match=r"batch\.completions: 3, but an example has 4 completions"):
        jaxpost.run(config)


@pytest.mark.parametrize("bad, reason", BAD)
def test_bad_rankings_are_named(given, tmp_path, bad, reason):
    config = reward_config(given[0], write_rankings(tmp_path / "r.jsonl", [*GOOD, bad]), tmp_path / "run")
    config |= {"loss": {"name": "all_pairs"}, "data": config["data"] | {"on_bad": "error"}}
    with pytest.raises(DataError, match=rf"r\.jsonl:41: .*\({reason}\)"):
        jaxpost.run(config)


@pytest.mark.parametrize("rejected", ["One.", None])
def test_a_pair_without_a_winner_is_refused(given, tmp_path, rejected):
    records = [{"prompt": "Why?", "chosen": "One.", "rejected": rejected}]
    config = reward_config(given[0], write_rankings(tmp_path / "p.jsonl", records), tmp_path / "run")
    config["data"] |= {"on_bad": "error"}
    with pytest.raises(DataError, match=r"p\.jsonl:1: .*(chosen_equals_rejected|not_text)"):
        jaxpost.run(config)


@pytest.mark.parametrize(
    "section, key, value, line",
    [
        ("model", "score_heads", 2, r"model\.score_heads: 2, but the stage dpo trains words"),
        ("batch", "completions", 2, r"batch\.completions: 2, but the stage dpo trains words"),
        ("reward", "margin", 0.5, r"reward\.margin: the stage dpo trains words"),
    ],
)
def test_keys_of_scores_belong_to_stages_of_scores(given, tmp_path, section, key, value, line):
    config = reward_config(*given, tmp_path / "run", heads=None) | {"stage": "dpo"}
    config.setdefault(section, {})[key] = value
    with pytest.raises(ConfigError, match=line):
        jaxpost.run(config)


# ---- steps of an answer ----

SUMS = [
    {
        "prompt": f"What is {n} + 1 + 1?",
        "completions": [f"{n} + 1 is {n + 1}.", f"Then {n + 2 + n % 2}."],
        "labels": [1, 1 - n % 2],
    }
    for n in range(40)
]


def test_a_process_loss_reads_the_ends_of_steps(scored):
    policy, params = scored
    tokens = RNG.integers(4, 48, 12).astype(np.int32)
    step, label = np.zeros(12, np.float32), np.zeros(12, np.float32)
    step[[5, 11]], label[5] = 1, 1
    values = {"step": (step,), "label": (label,)}
    ones = (np.ones(12, np.float32),)
    document = Document(np.zeros(0, np.int32), (tokens,), ones, 0, Origin("file", 1), token=values)
    found, metrics = loss_of(process_objective(policy, reward.process), params, batch_of([[document]], 0, 16))
    alone = batch_of([[document]], 0, 16).rows
    scores = np.asarray(policy.scores(params, policy.hidden(params, alone)[0])[0])
    losses = [np.log1p(np.exp(-scores[5])), np.log1p(np.exp(scores[11]))]
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean([scores[5].mean() > 0, scores[11].mean() <= 0]))


def test_a_process_reward_model_trains(given, tmp_path):
    config = reward_config(given[0], write_rankings(tmp_path / "s.jsonl", SUMS), tmp_path / "run", heads=1, steps=12)
    config |= {"loss": {"name": "process"}}
    run = jaxpost.run(config)
    losses = run.metrics["loss"][:, 1]
    np.testing.assert_allclose(losses[0], np.log(2), atol=1e-5)
    assert losses[-1] < losses[0] and {"eval/accuracy_low", "eval/accuracy_high"} <= set(run.metrics)
