"""What answers are worth: by a reward model, by a function of somebody else's, or by several of them together."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import numpy as np
from etils import epath

from jaxpost.data.rows import build_batch
from jaxpost.errors import ConfigError, DataError, ScoreError
from jaxpost.sharding import named_shardings, with_dtype
from jaxpost.tasks.functions import Function
from jaxpost.train import hosts, planned
from jaxpost.train.prompts import Asked
from jaxpost.train.run import LoadedModel, load_model
from jaxpost.train.scores import DOCUMENTS_PER_ROW, answer_document, batch_scores, score_documents, token_documents
from jaxpost.train.setup import Model, with_shardings
from jaxpost.types import Completion, Document

FUNCTION = re.compile(r"(?!embedded:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # `pkg.mod:fn`
FAILURES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Answer:
    """One completion of a prompt, and its visible text."""

    asked: Asked
    completion: Completion
    text: str


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of C answers.

    values: f64[C], NaN where there is none. spread: f64[C], standard deviation over an ensemble's heads; None: of no
    ensemble. failures: (index of the answer, one line why), of each that has no score.
    """

    values: np.ndarray
    spread: np.ndarray | None = None
    failures: tuple[tuple[int, str], ...] = ()


class Scorer(Protocol):
    """fingerprint: of what decides the scores, as far as it can be told."""

    name: str
    fingerprint: str

    def __call__(self, answers: Sequence[Answer]) -> Scored: ...

    def close(self) -> None:
        """Ends what it has started; may be called twice."""
        ...


def open_scorer(
    spec: str,
    key: str,
    model: Model,
    mesh,
    *,
    timeout_s: float,
    workers: int,
    combine: Literal["mean", "min"] = "mean",
) -> Scorer:
    """What `spec` under a key of the config names: a dotted path `pkg.mod:fn`, or a reward model by its run or folder.

    model: whose answers are scored. timeout_s, workers: of a function. combine: of a reward model's heads.
    Raises ConfigError, CheckpointError.
    """
    if planned.current():
        return PlannedScorer(None if is_function(spec) else load_model(spec, mesh=mesh, frozen=True).model)
    if is_function(spec):
        return FunctionScorer(spec, key, timeout_s=timeout_s, workers=workers)
    reward = load_model(spec, mesh=mesh, frozen=True)
    if not getattr(reward.model.policy.config, "num_scores", 0):
        raise ConfigError(f"{key}: {spec} has words for a head, not scores; train it with stage=reward first")
    return RewardModelScorer(reward, model, name=spec, combine=combine)


def is_function(spec: str) -> bool:
    """Whether it names a function, and no reward model."""
    return bool(FUNCTION.fullmatch(spec)) and not epath.Path(spec).exists()


@dataclasses.dataclass(frozen=True)
class PlannedScorer:
    """Of a planned run: the reward model that scores, None where a function does."""

    model: Model | None
    name: str = "planned"
    fingerprint: str = "planned"

    def program(self, rows: int, tokens: int, mesh) -> planned.Program:
        """What scores so many rows at a time."""
        policy = self.model.policy
        policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, num_scores=1, score_norm=()))
        params = {name: leaf for name, leaf in self.model.sharded.items() if name != "head"}
        like = jax.tree.leaves(params)[0].dtype
        axes, shape = policy.axes()["score"], with_dtype(policy.abstract()["score"], like)
        params["score"] = with_shardings(shape, named_shardings(axes, mesh, shape))
        (example, *_), branches = planned.documents("unpaired", None)
        shape = {"rows_per_step": rows, "tokens_per_row": tokens, "documents_per_row": DOCUMENTS_PER_ROW}
        batch = planned.as_shapes(build_batch([[example]], **shape, branches=branches), mesh)
        score = jax.jit(functools.partial(batch_scores, policy))
        ledger = {"reward": params, "batch": batch}
        return planned.Program("scoring", score, (params, batch), ledger, 1, policy, (rows, tokens), 1)


class RewardModelScorer:
    """Scores by a reward model, read at the last token, whether a stop token or not.

    Of the very tokens where both models have one tokenizer and template. Else of the text, rendered as in training: a
    completion that was cut at the longest length is then scored as if it had ended there.
    """

    def __init__(self, reward: LoadedModel, model: Model, *, name: str = "", combine: Literal["mean", "min"] = "mean"):
        self.name = name or reward.model.name
        self.fingerprint = reward.fingerprint()
        self._reward, self._combine = reward, combine
        one = reward.model
        self._same_tokens = (
            one.tokenizer.fingerprint == model.tokenizer.fingerprint
            and one.template.fingerprint == model.template.fingerprint
        )

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        documents: dict[int, Document] = {}
        failures = {}
        for index, answer in enumerate(answers):
            try:
                documents[index] = self._document(answer, index)
            except DataError as error:  # longer than the reward model reads, or not to be rendered
                failures[index] = f"{self.name}: {error}"
        reward, found = self._reward, list(documents)
        scores = score_documents(reward.model.policy, reward.params, reward.mesh, list(documents.values()))
        values, spread = np.full(len(answers), np.nan), np.full(len(answers), np.nan)
        values[found], spread[found] = getattr(scores, self._combine), scores.spread
        for index in found:
            if not np.isfinite(values[index]):
                failures[index] = f"{self.name}: {_of(answers[index])}: scored {values[index]}, not a finite number"
                values[index] = np.nan
        several = reward.model.policy.config.num_scores > 1
        return Scored(values, spread if several else None, tuple(sorted(failures.items())))

    def close(self) -> None:
        pass

    def _document(self, answer: Answer, index: int) -> Document:
        model, prompt = self._reward.model, answer.asked.example.prompt
        longest, origin = model.policy.config.max_positions, answer.asked.example.origin
        if self._same_tokens:
            tokens = [*answer.asked.tokens, *answer.completion.tokens]
            return dataclasses.replace(token_documents([tokens], longest)[0], example_id=index)
        if isinstance(prompt, str):
            raise DataError(f"{origin}: raw text, which a reward model of another tokenizer cannot score")
        encoding = {"template": model.template, "tokenizer": model.tokenizer, "max_tokens": longest}
        return answer_document(prompt, answer.text, origin, index, **encoding)


class FunctionScorer:
    """Scores by a function `(question, answer, record) -> float` in processes of its own.

    question: messages as dicts, or raw text; answer: its visible text; record: what the prompt was read from. A call
    that raises, gives no finite number, takes longer than timeout_s or ends its process is a failure of its answer. Of
    several hosts each calls it for its share of the answers.
    """

    def __init__(self, path: str, key: str, *, timeout_s: float, workers: int):
        self.name = self.fingerprint = path
        self._function = Function(path, key, workers=workers, timeout_s=timeout_s)

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        calls = [(answer.asked.question, answer.text, answer.asked.record) for answer in answers]
        values, faults = _spread(self._function, calls)
        failures = tuple((index, f"{self.name}: {_of(answers[index])}: {why}") for index, why in faults.items())
        return Scored(values, None, failures)

    def close(self) -> None:
        self._function.close()


def _spread(function: Function, calls: Sequence[tuple]) -> tuple[np.ndarray, dict[int, str]]:
    """`function(calls)`, of which each host makes every n-th call."""
    n = hosts.count()
    values, faults = function(calls[hosts.index() :: n])
    every, said = np.full(len(calls), np.nan), {}
    for host, (theirs, why) in enumerate(hosts.gathered([values.tolist(), list(faults.items())])):
        every[host::n] = theirs
        said |= {host + n * index: text for index, text in why}
    return every, dict(sorted(said.items()))


class WeightedSum:
    """Several scorers as one: the weighted sum of their values; an answer that one of them cannot score has none.

    Its spread is that of independent errors, of those that have any.
    """

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float]):
        self._parts = list(zip(scorers, weights, strict=True))
        self.name = " + ".join(f"{weight:g} * {scorer.name}" for scorer, weight in self._parts)
        self.fingerprint = " + ".join(f"{weight!r} * {scorer.fingerprint}" for scorer, weight in self._parts)

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        found = [(scorer(answers), weight) for scorer, weight in self._parts]
        values = np.sum([weight * scored.values for scored, weight in found], axis=0)
        spreads = [weight * scored.spread for scored, weight in found if scored.spread is not None]
        failures = sorted(failure for scored, _ in found for failure in scored.failures)
        return Scored(values, np.sqrt(np.sum(np.square(spreads), axis=0)) if spreads else None, tuple(failures))

    def close(self) -> None:
        for scorer, _ in self._parts:
            scorer.close()


def summed(scorers: Sequence[Scorer], weights: Sequence[float] | None = None) -> Scorer:
    """One scorer: the only one where it counts as it is, else the weighted sum. weights: None = 1 each."""
    weights = [1.0] * len(scorers) if weights is None else weights
    return scorers[0] if list(weights) == [1.0] else WeightedSum(scorers, weights)


def refuse_failures(scored: Scored, hint: str = "") -> None:
    """Raises ScoreError that names the first of the answers without a score, if there are any.

    hint: what else can be done, as "score.on_failure='skip' goes on without them".
    """
    if not scored.failures:
        return
    count = len({index for index, _ in scored.failures})
    lines = [line for _, line in scored.failures[:FAILURES_SHOWN]]
    more = "; ..." if len(scored.failures) > FAILURES_SHOWN else ""
    told = f" ({hint})" if hint else ""
    raise ScoreError(f"{count} of {len(scored.values)} answers have no score: {'; '.join(lines)}{more}{told}")


def _of(answer: Answer) -> str:
    """Which answer it is: the file and line of its prompt, and how it begins."""
    return f"{answer.asked.example.origin}, answer {answer.text[:40]!r}"
