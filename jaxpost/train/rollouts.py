"""Rollouts: the prompts of a step, their completions and scores, and the packed batch that these become."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxpost.data.rows import build_batch, pack
from jaxpost.errors import CheckpointError
from jaxpost.rl import hacking
from jaxpost.sampling.engine import Engine, Sampling, visible_text
from jaxpost.train import watchdog
from jaxpost.train.journal import Journal
from jaxpost.train.prompts import Asked, Prompts
from jaxpost.train.scoring import Answer, Scored, Scorer, refuse_failures
from jaxpost.types import Batch, Completion, Document


@dataclasses.dataclass(frozen=True)
class Rollout:
    """All that was drawn for one step. Completions are flat: those of the first prompt, of the second, ..."""

    indices: np.ndarray  # int64[P], of the prompts
    asked: tuple[Asked, ...]  # P
    completions: tuple[tuple[Completion, ...], ...]  # P x G
    scores: np.ndarray  # f64[P * G], NaN where it failed
    signs: dict[str, float]  # what is logged of it besides

    @property
    def tokens(self) -> int:
        return sum(len(completion.tokens) for group in self.completions for completion in group)


class Rollouts:
    """Draws and scores what a step learns from.

    settings: of the engine's draws. scorer, gold: see train/scoring.py; gold may be None. Prompts of step s (from 1 on)
    are those that `prompts.order` says, drawn by fold_in(seed's key, s).
    """

    def __init__(
        self,
        config,
        engine: Engine,
        settings: Sampling,
        prompts: Prompts,
        tokenizer,
        scorer: Scorer,
        gold: Scorer | None,
        folder,
    ):
        self.config, self.engine, self.settings = config, engine, settings
        self.prompts, self.tokenizer, self.scorer, self.gold = prompts, tokenizer, scorer, gold
        self.journal = Journal(folder / "rollouts")
        self.key = jax.random.fold_in(jax.random.key(config.run.seed), 1)  # not that of the updates

    def draw(self, step: int, params, identity: int) -> Rollout:
        """The rollout of a step, by these parameters of the policy; from the journal as far as it is there.

        params: None where all must be there; else CheckpointError. identity: tells these parameters from others, so
        that nothing is replayed that they did not draw.
        """
        shape = self.config.rollout
        indices = self.prompts.order(step - 1, shape.prompts_per_step, self.config.run.seed)
        asked = tuple(self.prompts[index] for index in indices.tolist())
        head = {"step": step, "policy": identity, "prompts": indices.tolist(), **dataclasses.asdict(self.settings)}
        done, scores = self.journal.begin(step, head | {"completions": shape.completions_per_prompt})
        rest = [place for place in range(len(asked)) if place not in done]
        if rest and params is None:
            path = self.journal.path(step)
            raise CheckpointError(
                f"{path}: missing or not whole; an asynchronous run goes on from what it had drawn ahead"
            )
        for place, group in self._drawn(step, params, asked, rest):
            texts = [self.text(completion) for completion in group]
            self.journal.add(step, place, said(asked[place]), group, texts)
            done[place] = group
        completions = tuple(done[place] for place in range(len(asked)))
        if scores is None:
            watchdog.enter("scoring", step)
            scores = self.score(asked, completions)
            self.journal.finish(step, scores)
        values = np.array(scores["reward"], np.float64)
        flat = [completion for group in completions for completion in group]
        return Rollout(indices, asked, completions, values, hacking.signs(flat) | scores["signs"])

    def _drawn(self, step: int, params, asked: Sequence[Asked], places: Sequence[int]):
        """Yields (place, completions) of the step's prompts at these places, as they are finished."""
        if not places:
            return
        found = self.engine.stream(
            params,
            [asked[place].tokens for place in places],
            jax.random.fold_in(self.key, step),
            settings=self.settings,
            completions=self.config.rollout.completions_per_prompt,
            indices=places,  # of the step, not of the data: a prompt that it holds twice is drawn twice
        )
        for n, group in found:
            yield places[n], group

    def score(self, asked: Sequence[Asked], completions) -> dict:
        """{"reward": a number a completion, "signs": metrics}, as JSON."""
        answers = [
            Answer(one, completion, self.text(completion))
            for one, group in zip(asked, completions, strict=True)
            for completion in group
        ]
        found, signs = self.scorer(answers), {}
        if self.config.score.on_failure == "stop":
            refuse_failures(found, "score.on_failure='skip' goes on without them")
        signs["score_failures"] = float(len(found.failures))
        if found.spread is not None:
            signs["spread"] = float(np.nanmean(found.spread))
        if self.gold is not None:
            signs["gold"] = mean(self.gold(answers))
        values = [value if np.isfinite(value) else None for value in found.values.tolist()]
        return {"reward": values, "signs": signs}

    def text(self, completion: Completion) -> str:
        return visible_text(completion, self.tokenizer, self.settings)

    def close(self) -> None:
        """Ends what scores."""
        for scorer in filter(None, (self.scorer, self.gold)):
            scorer.close()


def mean(scored: Scored) -> float:
    """Over the completions that have a score; NaN where none has."""
    there = scored.values[np.isfinite(scored.values)]
    return float(there.mean()) if len(there) else float("nan")


def said(asked: Asked) -> str:
    """The last thing said."""
    return asked.question if isinstance(asked.question, str) else str(asked.question[-1]["content"])


def documents(rollout: Rollout, tokens_per_row: int) -> list[Document]:
    """A document a prompt, or several where its completions do not fit in a row; in the order of the prompts."""
    found, groups = [], len(rollout.completions[0])
    scores = rollout.scores.reshape(-1, groups)
    for place, (asked, group) in enumerate(zip(rollout.asked, rollout.completions, strict=True)):
        for members in _fitting(len(asked.tokens), group, tokens_per_row):
            found.append(_document(asked, int(rollout.indices[place]), members, group, scores[place]))
    return found


def _fitting(prompt: int, group, tokens_per_row: int) -> list[list[int]]:
    """Members of a group, in parts that fit in a row."""
    parts, left = [], 0
    for n, completion in enumerate(group):
        cost = 1 + len(completion.tokens)
        if not parts or cost > left:
            parts.append([])
            left = tokens_per_row - (prompt - 1)
        parts[-1].append(n)
        left -= cost
    return parts


def _document(asked: Asked, index: int, members: list[int], group, scores) -> Document:
    chosen = [group[n] for n in members]
    scored = np.isfinite(scores[members])
    return Document(
        prompt=asked.tokens,
        completions=tuple(completion.tokens for completion in chosen),
        weights=tuple(np.full(len(c.tokens), s, np.float32) for c, s in zip(chosen, scored, strict=True)),
        example_id=index,
        origin=asked.example.origin,
        token={
            "sampler_logps": tuple(completion.logps for completion in chosen),
            "drawn_logps": tuple(completion.drawn_logps for completion in chosen),
        },
        completion={
            "score": tuple(np.where(scored, scores[members], 0.0).tolist()),
            "scored": tuple(scored.astype(float).tolist()),
            "ended": tuple(float(completion.finish_reason == "stop") for completion in chosen),
        },
    )


def to_batch(rollout: Rollout, batch, *, branches: int, minibatches: int) -> tuple[Batch, int]:
    """(packed rows, microbatches of a minibatch): as many rows as the rollout needs, in multiples of a microbatch of
    `batch.rows_per_step` rows for each minibatch; what is over stays empty."""
    whole = documents(rollout, batch.tokens_per_row)
    most = max(1, min(batch.documents_per_row, len(whole) // minibatches))  # so that no minibatch is empty
    rows = pack([document.cost for document in whole], batch.tokens_per_row, most)
    microbatches = max(1, -(-len(rows) // (minibatches * batch.rows_per_step)))
    found = build_batch(
        [[whole[index] for index in row] for row in rows],
        rows_per_step=microbatches * minibatches * batch.rows_per_step,
        tokens_per_row=batch.tokens_per_row,
        documents_per_row=batch.documents_per_row,
        branches=branches,
    )
    return found, microbatches
