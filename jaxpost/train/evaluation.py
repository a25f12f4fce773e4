"""Evaluation on held-out documents: the objective's own metrics, a few completions, and the embedded world's rule."""

import dataclasses
import math

import jax
import numpy as np

from jaxpost import embedded
from jaxpost.sharding import host_rows, place
from jaxpost.train.adapters import on_whole
from jaxpost.train.run import LoadedModel
from jaxpost.train.setup import one_pass
from jaxpost.train.step import make_eval_step, total_loss
from jaxpost.types import Term, TrainState

TEXT_PROMPT_TOKENS = 8
INTERVAL = 1.959964  # standard normal quantile of a 95 % interval


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """metrics: {name: value}; samples: (prompt, completion) as text."""

    metrics: dict[str, float]
    samples: tuple[tuple[str, str], ...]

    def rows(self) -> dict[str, float]:
        """The metrics as they stand in metrics.jsonl."""
        return {f"eval/{name}": value for name, value in self.metrics.items()}


class Evaluator:
    """Evaluates a TrainState on the evaluation documents, the same ones in the same rows every time.

    objective, frozen: as `fit` has them.
    """

    def __init__(self, config, mesh, model, data, objective, frozen):
        self.config, self.mesh, self.model, self.data = config, mesh, model, data
        self.frozen = {**(frozen or {}), **model.load_frozen()}
        self.step = jax.jit(make_eval_step(on_whole(model.policy, objective)))
        self.in_world = {path for path, _ in config.data.eval or ()} == {"embedded"}
        self.prompts = [prompt_of(data.eval[i]) for i in range(min(config.run.eval_prompts, len(data.eval or ())))]

    def __call__(self, state: TrainState) -> Evaluation:
        metrics = self.objective_metrics(state) if self.data.eval is not None else {}
        if getattr(self.model.policy.config, "num_scores", 0):  # no words to show
            return Evaluation(metrics, ())
        new_tokens, now = self.config.run.eval_new_tokens, LoadedModel(self.model, self.whole(state.params), self.mesh)
        if self.in_world and self.config.run.eval_prompts:

            def ask(questions):
                return now.answer([[{"role": "user", "content": question}] for question in questions], new_tokens)

            metrics |= {f"world/{name}": value for name, value in embedded.evaluate(ask).items()}
        completions = now.complete(self.prompts, new_tokens)
        texts = [self.model.tokenizer.decode(p.tolist(), skip_special=False) for p in self.prompts]
        return Evaluation(metrics, tuple(zip(texts, completions, strict=True)))

    def extra(self, params) -> dict:
        """What a checkpoint of these parameters holds besides; as JSON."""
        return {}

    def whole(self, params):
        """All parameters of the model, out of those that train."""
        return self.model.policy.whole(params, self.frozen)

    def objective_metrics(self, state: TrainState) -> dict[str, float]:
        """Loss and metrics over all evaluation documents; a share of pairs comes with its 95 % interval."""
        terms, metrics = {}, {}
        with jax.set_mesh(self.mesh):
            for batch in self.batches():
                new_terms, new_metrics = jax.device_get(self.step(state.params, self.frozen, state.carry, batch))
                terms = {
                    n: Term(t.coefficient, t.mean + terms[n].mean if terms else t.mean) for n, t in new_terms.items()
                }
                metrics = {n: m + metrics[n] if metrics else m for n, m in new_metrics.items()}
        found = {"loss": total_loss(terms), **{name: float(mean.value) for name, mean in metrics.items()}}
        for name in metrics.keys() & {"rewards/accuracies", "accuracy"}:
            found |= with_interval(name, float(metrics[name].value), float(metrics[name].weight))
        return found

    def batches(self):
        loader = one_pass(self.config, self.data.eval, self.data.branches)
        rows = host_rows(self.mesh, loader.rows_per_step)
        for step in range(loader.steps_in_epoch(0)):
            yield place(loader.batch(step, rows), self.mesh, rows, loader.rows_per_step)


def prompt_of(document) -> np.ndarray:
    """What a document's first completion answers: its prompt, or all before the first trained token.

    Raw text is trained from its beginning: there it is the first few tokens, to be continued.
    """
    if not document.linear:
        return document.prompt
    first = int(np.argmax(document.weights[0] > 0))
    return document.completions[0][: first if first > 1 else TEXT_PROMPT_TOKENS]


def with_interval(name: str, share: float, count: float) -> dict[str, float]:
    """A share of `count` trials under its name, with its 95 % interval."""
    low, high = wilson_interval(share, count)
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share of `count` trials (Wilson 1927)."""
    z2 = INTERVAL**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = INTERVAL / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
