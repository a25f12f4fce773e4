"""What a reward model is worth on held-out rankings: accuracy, calibration, length bias; and its normalisation."""

import dataclasses
import json
import logging
import math

import numpy as np

from jaxpost.data import pictures
from jaxpost.errors import UserError
from jaxpost.train.evaluation import INTERVAL, Evaluation, Evaluator, wilson_interval
from jaxpost.train.folder import write_atomically
from jaxpost.train.report import short_names
from jaxpost.train.scores import loader_scores, normalization
from jaxpost.train.setup import one_pass
from jaxpost.types import TrainState

log = logging.getLogger("jaxpost")

NAME = "reward"  # of the report (.json) and its picture (.png) in a run folder
BINS, PAIRS_PER_BIN = 10, 20  # of the calibration curve: at most, at least
DISTANCES = 5  # buckets of the data's own margins, at most
SHOWN = 400  # characters of a completion in the table of samples


class RewardEvaluator(Evaluator):
    """The objective's metrics on held-out rankings, what `report` says of them, and scores in place of samples.

    reference_set: rankings whose scores a checkpoint is normalised by; None: those evaluated on.
    """

    def __init__(self, config, mesh, model, data, objective, reference_set=None):
        super().__init__(config, mesh, model, data, objective, frozen=None)
        self._reference_set = reference_set
        self._newest = None, None  # parameters, scores of data.eval by them

    def __call__(self, state: TrainState) -> Evaluation:
        if self.data.eval is None:
            return Evaluation({}, ())
        scores = self.scores(state.params)
        found = flat(report(self.data.eval, scores.mean(-1)))
        return Evaluation(self.objective_metrics(state) | found, tuple(self._samples(scores.mean(-1))))

    def scores(self, params) -> np.ndarray:
        """f32[documents, N, R] of the evaluation data; the newest are kept."""
        if self._newest[0] is not params:
            self._newest = params, self._scored(params, self.data.eval)
        return self._newest[1]

    def extra(self, params) -> dict:
        if self._reference_set is None and self.data.eval is None:
            return {}
        given = self._reference_set is not None
        scores = self._scored(params, self._reference_set) if given else self.scores(params)
        return {"score_norm": normalization(scores[~np.isnan(scores[..., 0])])}

    def _scored(self, params, documents) -> np.ndarray:
        most = max(self.data.branches, documents.most_completions)
        return loader_scores(self.model.policy, self.whole(params), self.mesh, one_pass(self.config, documents, most))

    def _samples(self, scores):
        """(prompt, each completion with its score) of the first documents, as text."""
        decode = self.model.tokenizer.decode
        for prompt, document, given in zip(self.prompts, self.data.eval, scores, strict=False):
            texts = [decode(completion.tolist()).strip()[:SHOWN] for completion in document.completions]
            lines = [f"{score:+.3f} {text}" for score, text in zip(given, texts, strict=False)]
            yield decode(prompt.tolist(), skip_special=False), "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All P pairs of completions that the data tell apart, the better one first."""

    margin: np.ndarray  # f64[P]: by how much the model scores it higher
    distance: np.ndarray  # f64[P]: by how much the data do
    ranking: np.ndarray  # int[P]: whose pair it is

    def __getitem__(self, index) -> "Pairs":
        return Pairs(self.margin[index], self.distance[index], self.ranking[index])

    def accuracy(self) -> dict[str, float]:
        """The share scored in the right order (a tie is wrong), with its 95 % interval.

        Pairs of one ranking are not independent: the interval takes a ranking for one trial, so it is rather too wide.
        """
        share, rankings = float((self.margin > 0).mean()), len(np.unique(self.ranking))
        low, high = wilson_interval(share, rankings)
        return {"value": share, "low": low, "high": high, "pairs": len(self.margin), "rankings": rankings}


def pairs_of(documents, scores: np.ndarray) -> Pairs:
    """scores: [documents, N], NaN where there is no completion."""
    margin, distance, ranking = [], [], []
    for index, (document, of_model) in enumerate(zip(documents, scores.astype(np.float64), strict=True)):
        given = np.array(document.completion["score"], np.float64)
        better, worse = np.nonzero(given[:, None] > given[None, :])
        margin.append(of_model[better] - of_model[worse])
        distance.append(given[better] - given[worse])
        ranking.append(np.full(len(better), index))
    return Pairs(np.concatenate(margin), np.concatenate(distance), np.concatenate(ranking))


def report(documents, scores: np.ndarray) -> dict:
    """What the scores [documents, N] say about the pairs of the rankings, as JSON.

    accuracy: of all pairs. by_distance: by how much better the data call the better one. by_source: by file.
    calibration: by how much better the model calls it, with the share of right ones that sigma of that margin predicts;
    calibration_error: mean distance of the two over pairs (ECE, Guo et al. 2017, arXiv:1706.04599, equation 3).
    length_correlation: of the scores of all completions and their tokens (Pearson), None where one of them is constant.
    """
    pairs = pairs_of(documents, scores)
    curve = calibration(pairs)
    error = sum(bin["pairs"] * abs(bin["value"] - bin["predicted"]) for bin in curve) / len(pairs.margin)
    paths = np.array([document.origin.path for document in documents])
    sources = short_names(sorted(set(paths.tolist())))
    return {
        "accuracy": pairs.accuracy(),
        "by_distance": by_distance(pairs),
        "by_source": {name: pairs[paths[pairs.ranking] == path].accuracy() for path, name in sources.items()},
        "calibration": curve,
        "calibration_error": error,
        "length_correlation": length_correlation(*lengths_and_scores(documents, scores), rankings=len(documents)),
    }


def calibration(pairs: Pairs) -> list[dict]:
    """Accuracy in bins of equally many pairs by the size of the model's margin, beside what it predicts."""
    sizes = np.abs(pairs.margin)
    order = np.argsort(sizes, kind="stable")
    found = []
    for part in np.array_split(order, max(1, min(BINS, len(order) // PAIRS_PER_BIN))):
        predicted = float((1 / (1 + np.exp(-sizes[part]))).mean())
        limits = {"from": float(sizes[part[0]]), "to": float(sizes[part[-1]])}
        found.append({**limits, "predicted": predicted, **pairs[part].accuracy()})
    return found


def by_distance(pairs: Pairs) -> list[dict]:
    """Accuracy by the data's own margin: each value of it, or, where there are many, buckets of about equal size."""
    edges = np.unique(pairs.distance)
    if len(edges) > DISTANCES:
        edges = np.unique(np.quantile(pairs.distance, np.linspace(0, 1, DISTANCES + 1)[:-1], method="higher"))
    bucket = np.searchsorted(edges, pairs.distance, side="right") - 1
    found = []
    for number in range(len(edges)):
        part = pairs[bucket == number]
        limits = {"from": float(part.distance.min()), "to": float(part.distance.max())}
        found.append({**limits, **part.accuracy()})
    return found


def lengths_and_scores(documents, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and score of every completion, f64[C] each."""
    lengths = [len(completion) for document in documents for completion in document.completions]
    return np.array(lengths, np.float64), scores[~np.isnan(scores)].astype(np.float64)


def length_correlation(lengths: np.ndarray, scores: np.ndarray, rankings: int) -> dict[str, float] | None:
    """Pearson's correlation with Fisher's 95 % interval, which takes a ranking for one observation."""
    if lengths.std() == 0 or scores.std() == 0:
        return None
    value = float(np.corrcoef(lengths, scores)[0, 1])
    half = INTERVAL / math.sqrt(rankings - 3) if rankings > 3 else math.inf
    centre = math.atanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    return {"value": value, "low": math.tanh(centre - half), "high": math.tanh(centre + half)}


def flat(found: dict) -> dict[str, float]:
    """The numbers of a report that stand in metrics.jsonl; of sources where there are several."""
    named = {"accuracy": found["accuracy"], "length_correlation": found["length_correlation"]}
    if len(found["by_source"]) > 1:
        named |= {f"accuracy/{name}": share for name, share in found["by_source"].items()}
    metrics = {"calibration_error": found["calibration_error"]}
    for name, share in named.items():
        if share is not None:
            metrics |= {name: share["value"], f"{name}_low": share["low"], f"{name}_high": share["high"]}
    return metrics


def write_report(folder, documents, scores: np.ndarray) -> None:
    """reward.json, and where matplotlib is installed reward.png, in a run folder. scores: [documents, N]."""
    found = report(documents, scores)
    write_atomically(folder / f"{NAME}.json", json.dumps(found, indent=1) + "\n")
    try:
        figure = pictures.new_figure(f"a picture of {folder / NAME}.json", figsize=(12, 4))
    except UserError as error:
        log.warning("%s", error)
        return
    curve, buckets, scatter = figure.subplots(1, 3)
    draw_shares(curve, [bin["predicted"] for bin in found["calibration"]], found["calibration"])
    curve.plot((0.5, 1), (0.5, 1), color="black", linewidth=1)
    curve.set(xlabel="sigmoid of the margin: predicted", ylabel="in the right order", title="calibration")
    draw_shares(buckets, [(bin["from"] + bin["to"]) / 2 for bin in found["by_distance"]], found["by_distance"])
    buckets.set(xlabel="margin in the data", ylabel="in the right order", title="accuracy by margin", ylim=(0, 1.02))
    lengths, values = lengths_and_scores(documents, scores)
    scatter.scatter(lengths, values, s=6, alpha=0.5)
    said = found["length_correlation"]
    title = f"correlation {said['value']:.2f} [{said['low']:.2f}, {said['high']:.2f}]" if said else "no correlation"
    scatter.set(xlabel="tokens of the completion", ylabel="score", title=title)
    pictures.save(figure, folder / f"{NAME}.png")


def draw_shares(axes, places, shares: list[dict]) -> None:
    """Shares with their 95 % intervals."""
    values = np.array([share["value"] for share in shares])
    limits = np.array([[share["low"], share["high"]] for share in shares]).T
    axes.errorbar(places, values, np.maximum((values - limits[0], limits[1] - values), 0), fmt="o-", capsize=3)
