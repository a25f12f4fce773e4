"""Reward models: pairs and rankings of the embedded world, an ensemble that knows what it does not know, dialogues."""

import collections
import gzip
import json
import pathlib
import tempfile
import time

import numpy as np

import jaxpost
from jaxpost import config as configs
from jaxpost import embedded
from jaxpost.train.ranking import pairs_of
from jaxpost.train.scores import loader_scores
from jaxpost.train.setup import one_pass, open_data, open_model
from tests.shared import SHARED

PICTURE = pathlib.Path(__file__).parents[2] / "docs" / "claims" / "spread.png"
# Rankings of four that the pairs of one question make: by kind of the pair, whose rejected answer has which score.
RANKINGS = ({"bare": 1, "wrong_plain": 0, "wrong": 0}, {"rude": 0, "rambling": 0, "rambling_wrong": 0})


def write_rankings(path: pathlib.Path, held_out: set[int]) -> pathlib.Path:
    """The embedded pairs but those held out, as rankings of up to four: the best answer and three rejected ones."""
    questions = collections.defaultdict(dict)  # question -> kind -> pair
    with gzip.open(embedded.path("preferences"), "rt", encoding="utf-8") as file:
        for line, pair in enumerate(map(json.loads, file), start=1):
            if line not in held_out:
                questions[json.dumps(pair["prompt"])][pair["kind"]] = pair
    records = []
    for prompt, pairs in questions.items():
        best = next(pair["chosen"] for kind, pair in pairs.items() if kind != "wrong_plain")
        for scores in RANKINGS:
            kept = {kind: score for kind, score in scores.items() if kind in pairs}
            answers = [best, *(pairs[kind]["rejected"] for kind in kept)]
            if len(answers) > 1:
                given = {"completions": answers, "scores": [2, *kept.values()]}
                records.append({"prompt": json.loads(prompt), **given})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def embedded_pairs() -> list[tuple]:
    """A reward model of four heads on the embedded pairs; the spread of its heads at home and on Shakespeare."""
    settings = jaxpost.get_config("reward")
    run, how = trained(settings)
    held_out, facts = held_out_pairs(settings), documents("embedded:preferences_eval")
    accuracy = pairs_of(held_out, scores_of(run, held_out)).accuracy()
    unseen = pairs_of(facts, scores_of(run, facts)).accuracy()
    at_home, away = spreads(run, held_out)
    ratio = away.mean() / at_home.mean()
    draw_spreads(at_home, away)
    return [
        (f"accuracy on 200 held-out pairs {interval(accuracy)}", how, accuracy["value"], "at least 0.95",
         accuracy["value"] >= 0.95),
        (f"accuracy on pairs about facts that no pair of the training data names {interval(unseen)}", how,
         unseen["value"], "reported", True),
        ("spread of the heads, mean over answers of held-out pairs", how, at_home.mean(), "reported", True),
        ("the same, Shakespeare cut into answers to the same questions", how, away.mean(), "reported", True),
        ("ratio of the two ([picture](spread.png))", how, ratio, "at least 2", ratio >= 2),
    ]  # fmt: skip


def embedded_rankings() -> list[tuple]:
    """The same answers in rankings of up to four, prompt once: `all_pairs`, on the pairs that `reward` holds out."""
    settings = jaxpost.get_config("reward")
    held_out = held_out_pairs(settings)
    path = pathlib.Path(tempfile.mkdtemp()) / "rankings.jsonl"
    settings.data.train = str(write_rankings(path, {document.origin.line for document in held_out}))
    settings.data.eval_examples, settings.loss = 0, {"name": "all_pairs"}
    run, how = trained(settings)
    accuracy = pairs_of(held_out, scores_of(run, held_out)).accuracy()
    right = f"accuracy on the 200 held-out pairs {interval(accuracy)}"
    return [(right, how, accuracy["value"], "at least 0.95", accuracy["value"] >= 0.95)]


def dialogues() -> list[tuple]:
    """A pretrained 260 K Llama as a reward model on hh-rlhf, one pass."""
    settings = jaxpost.get_config("reward")
    settings.model.path = str(SHARED / "models" / "stories260K")
    settings.data.train = str(SHARED / "data" / "hh_rlhf" / "pairs.jsonl.gz")
    settings.data.max_dropped = 0.4  # so many dialogues are longer than the 512 tokens of the model, or of a row
    settings.batch.tokens_per_row, settings.run.steps, settings.run.epochs = 512, None, 1
    settings.model.score_heads = 1
    run, how = trained(settings)
    losses, shares = run.metrics["loss"][:, 1], run.metrics["accuracy"][:, 1]
    last = {name: values[-1, 1] for name, values in run.metrics.items() if name.startswith("eval/")}
    bounds = lambda name: f"[{last[f'eval/{name}_low']:.3f}, {last[f'eval/{name}_high']:.3f}]"  # noqa: E731
    late, finite = shares[-len(shares) // 4 :].mean(), np.isfinite(losses)
    return [
        ("steps of the pass with a finite loss, share", how, finite.mean(), "1", finite.all()),
        ("accuracy on training pairs, mean of the pass's last quarter", how, late, "above 0.6", late > 0.6),
        (f"accuracy on 200 held-out pairs {bounds('accuracy')}", how, last["eval/accuracy"], "reported", True),
        (f"correlation of score and length {bounds('length_correlation')}", how, last["eval/length_correlation"],
         "reported", True),
    ]  # fmt: skip


def trained(settings) -> tuple:
    """(the run, what is said of it), in a folder that is thrown away."""
    settings.run.dir, settings.run.eval_prompts = tempfile.mkdtemp() + "/run", 0
    began = time.perf_counter()
    run = jaxpost.run(settings)
    return run, f"seed {settings.run.seed}, {time.perf_counter() - began:.0f} s"


def documents(path: str):
    """The rankings of a file, as the reward model of the config `reward` reads them."""
    settings = jaxpost.get_config("reward")
    settings.data.train, settings.data.eval_examples = path, 0
    config = configs.resolve(settings)
    return open_data(config, open_model(config, None), "ranking").train


def held_out_pairs(settings):
    """The pairs that a run of this config holds out."""
    config = configs.resolve(settings)
    return open_data(config, open_model(config, None), "ranking").eval


def scores_of(run, held_out) -> np.ndarray:
    """f32[documents, N], the mean over the heads."""
    config = configs.resolve(jaxpost.get_config("reward"))
    return loader_scores(run.model.policy, run.params, run.mesh, one_pass(config, held_out, 2)).mean(-1)


def spreads(run, held_out) -> tuple[np.ndarray, np.ndarray]:
    """Spread of the heads' normalised scores: of held-out pairs' answers, of as many speeches."""
    with gzip.open(embedded.path("preferences"), "rt", encoding="utf-8") as file:
        records = list(map(json.loads, file))
    asked = [records[document.origin.line - 1] for document in held_out]
    text = (SHARED / "data" / "tinyshakespeare" / "input.txt").read_text()
    speeches = [" ".join(speech.partition(":")[2].split())[:200] for speech in text.split("\n\n")]
    lines = iter([speech for speech in speeches if len(speech) >= 20])
    own, other = [], []
    for pair in asked:
        question = pair["prompt"][0]["content"]
        own.append(run.score(question, [pair["chosen"][0]["content"], pair["rejected"][0]["content"]]).spread)
        other.append(run.score(question, [next(lines), next(lines)]).spread)
    return np.concatenate(own), np.concatenate(other)


def draw_spreads(at_home: np.ndarray, away: np.ndarray) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, max(at_home.max(), away.max()), 50)
    for values, name in ((at_home, "answers of held-out pairs"), (away, "tinyshakespeare cut into answers")):
        axes.hist(values, bins=bins, alpha=0.6, label=f"{name}: mean {values.mean():.3f}")
    axes.set(xlabel="standard deviation of four heads' scores (spread of all scores: 1)", ylabel="answers")
    axes.legend()
    figure.savefig(PICTURE, dpi=110)


def interval(share: dict) -> str:
    return f"[{share['low']:.3f}, {share['high']:.3f}]"
