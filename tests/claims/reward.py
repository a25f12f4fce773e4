"""Reward models: pairs and rankings of the embedded world, ensembles and what they do not know, dialogues."""

import collections
import gzip
import itertools
import json
import pathlib
import tempfile
import time

import numpy as np

import jaxpost
from jaxpost import config as configs
from jaxpost import embedded
from jaxpost.train.ranking import pairs_of
from jaxpost.train.scores import joined, loader_scores
from jaxpost.train.setup import one_pass, open_data, open_model
from tests.shared import SHARED

# An ensemble: its models, reward.init_std of their heads, and steps: what training leaves to chance is spread too.
MEMBERS, PRIOR, STEPS = 3, 4.0, 1600
PICTURE = pathlib.Path(__file__).parents[2] / "docs" / "claims" / "spread.png"
# Rankings of four that the pairs of one question make: by kind of the pair, whose rejected answer has which score.
# A right answer without a polite close is the best beside a wrong one alone.
RANKINGS = ({"bare": 1, "wrong": 0, "wrong_plain": 0}, {"rude": 0, "rambling": 0, "rambling_wrong": 0})


def write_rankings(path: pathlib.Path) -> pathlib.Path:
    """The pairs that reward models train on, as rankings of up to four: the best answer and three rejected ones.

    One that would hold a held-out pair, from answers of several pairs, is left out.
    """
    questions = collections.defaultdict(lambda: collections.defaultdict(list))  # question -> kind -> pairs
    for pair in records("comparisons"):
        questions[json.dumps(pair["prompt"])][pair["kind"]].append(pair)
    texts = lambda pair: json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]])  # noqa: E731
    held_out = set(map(texts, records("comparisons_eval")))
    with path.open("w", encoding="utf-8") as file:
        for asked, pairs in questions.items():
            for n, scores in itertools.product(range(max(map(len, pairs.values()))), RANKINGS):
                kept = {kind: pairs[kind][n] for kind in scores if n < len(pairs[kind])}
                if not kept:
                    continue
                prompt, best = json.loads(asked), next(iter(kept.values()))["chosen"]
                rejected = [pair["rejected"] for pair in kept.values()]
                if held_out.isdisjoint(json.dumps([prompt, best, other]) for other in rejected):
                    given = {"completions": [best, *rejected], "scores": [2, *(scores[kind] for kind in kept)]}
                    file.write(json.dumps({"prompt": prompt, **given}) + "\n")
    return path


def records(name: str) -> list[dict]:
    """Those of a file of the embedded world."""
    with gzip.open(embedded.path(name), "rt", encoding="utf-8") as file:
        return list(map(json.loads, file))


def embedded_pairs() -> list[tuple]:
    """A reward model of four heads on the embedded pairs, and how far its heads differ at home and on Shakespeare."""
    run, how = trained(jaxpost.get_config("reward"))
    at_home, away = (scores.spread.mean() for scores in (run.score_tokens(tokens) for tokens in home_and_away(run)))
    right, unseen = (accuracy_on(run, name) for name in ("comparisons_eval", "preferences_eval"))
    return [
        (f"accuracy on held-out pairs {interval(right)}", how, right["value"], "at least 0.95", right["value"] >= 0.95),
        (f"accuracy on pairs about facts that no pair of the training data names {interval(unseen)}", how,
         unseen["value"], "reported", True),
        ("spread of the heads, mean over answers of held-out pairs", how, at_home, "reported", True),
        ("the same, Shakespeare cut into answers to the same questions", how, away, "reported", True),
    ]  # fmt: skip


def ensemble() -> list[tuple]:
    """Reward models of one head each from several seeds, as one ensemble: it differs more where it was not trained."""
    rows, home, away = [], [], []
    for seed in range(MEMBERS):
        settings = jaxpost.get_config("reward")
        settings.run.update({"seed": seed, "steps": STEPS})
        settings.model.score_heads, settings.reward.init_std = 1, PRIOR
        run, how = trained(settings)
        right = accuracy_on(run, "comparisons_eval")
        rows.append((f"accuracy on held-out pairs {interval(right)}", how, right["value"], "reported", True))
        for scores, tokens in zip((home, away), home_and_away(run), strict=True):
            scores.append(run.score_tokens(tokens))
    home, away = joined(home), joined(away)
    right, how = (home.mean[::2] > home.mean[1::2]).mean(), f"{MEMBERS} seeds"
    at_home, elsewhere = home.spread.mean(), away.spread.mean()
    draw_spreads(home.spread, away.spread)
    return [
        *rows,
        ("accuracy of their mean", how, right, "at least 0.95", right >= 0.95),
        ("spread, mean over answers of held-out pairs", how, at_home, "reported", True),
        ("the same, Shakespeare cut into answers to the same questions", how, elsewhere, "reported", True),
        ("ratio of the two ([picture](spread.png))", how, elsewhere / at_home, "at least 2", elsewhere >= 2 * at_home),
    ]


def embedded_rankings() -> list[tuple]:
    """The same answers in rankings of up to four, prompt once: `all_pairs`, judged on the same held-out pairs."""
    settings = jaxpost.get_config("reward")
    settings.data.train = str(write_rankings(pathlib.Path(tempfile.mkdtemp()) / "rankings.jsonl"))
    settings.data.eval_examples, settings.loss = 0, {"name": "all_pairs", "label_smoothing": 0.1}
    run, how = trained(settings)
    right = accuracy_on(run, "comparisons_eval")
    what = f"accuracy on the held-out pairs {interval(right)}"
    return [(what, how, right["value"], "at least 0.95", right["value"] >= 0.95)]


def dialogues() -> list[tuple]:
    """A pretrained 260 K Llama as a reward model on hh-rlhf, one pass."""
    settings = jaxpost.get_config("reward")
    settings.model.path = str(SHARED / "models" / "stories260K")
    settings.data.train = str(SHARED / "data" / "hh_rlhf" / "pairs.jsonl.gz")
    settings.data.max_dropped = 0.4  # so many dialogues are longer than the 512 tokens of the model, or of a row
    settings.batch.update({"rows_per_step": 8, "tokens_per_row": 512})
    settings.run.update({"steps": None, "epochs": 1})
    settings.model.score_heads, settings.optimizer.name, settings.loss.label_smoothing = 1, "adamw", 0.0
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
    began = time.process_time()
    run = jaxpost.run(settings)
    return run, f"seed {settings.run.seed}, {time.process_time() - began:.0f} CPU seconds"


def accuracy_on(run, name: str) -> dict:
    """Of the pairs of an embedded file, scored by the mean over the heads: value and interval."""
    settings = jaxpost.get_config("reward")
    settings.data.train, settings.data.eval_examples = f"embedded:{name}", 0
    config = configs.resolve(settings)
    pairs = open_data(config, open_model(config, None), "ranking").train
    scores = loader_scores(run.model.policy, run.params, run.mesh, one_pass(config, pairs, 2))
    return pairs_of(pairs, scores.mean(-1)).accuracy()


def home_and_away(run) -> tuple[list, list]:
    """Tokens of the dialogues of held-out pairs, chosen before rejected, and with as many speeches for answers."""
    text = (SHARED / "data" / "tinyshakespeare" / "input.txt").read_text()
    speeches = [" ".join(speech.partition(":")[2].split())[:200] for speech in text.split("\n\n")]
    lines = iter([speech for speech in speeches if len(speech) >= 20])
    own, other = [], []
    for pair in records("comparisons_eval"):
        for answer in (pair["chosen"], pair["rejected"]):
            own.append([*pair["prompt"], *answer])
            other.append([*pair["prompt"], {"role": "assistant", "content": next(lines)}])
    encode = lambda messages: run.model.template.encode(messages, run.model.tokenizer)  # noqa: E731
    return list(map(encode, own)), list(map(encode, other))


def draw_spreads(at_home: np.ndarray, away: np.ndarray) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, max(at_home.max(), away.max()), 50)
    for values, name in ((at_home, "answers of held-out pairs"), (away, "tinyshakespeare cut into answers")):
        axes.hist(values, bins=bins, alpha=0.6, label=f"{name}: mean {values.mean():.3f}")
    axes.set(xlabel=f"standard deviation of {MEMBERS} models' scores (spread of all scores: 1)", ylabel="answers")
    axes.legend()
    figure.savefig(PICTURE, dpi=110)


def interval(share: dict) -> str:
    return f"[{share['low']:.3f}, {share['high']:.3f}]"
