"""The prompts of a run: read, rendered as the model is asked them, and the order in which they are asked."""

import dataclasses

import numpy as np

from jaxpost.data.dataset import Dataset
from jaxpost.data.encode import encode
from jaxpost.data.formats import Example
from jaxpost.data.loader import random_order
from jaxpost.data.questions import question
from jaxpost.data.sources import Source
from jaxpost.sampling.engine import Sampling, check_prompts
from jaxpost.train import planned, setup
from jaxpost.train.setup import Model

ANY_LENGTH = 2**31


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt: the record it was read from, and as the model sees it (int32[P])."""

    record: dict
    example: Example
    tokens: np.ndarray

    @property
    def question(self) -> list[dict] | str:
        """The messages of a conversation, or raw text."""
        prompt = self.example.prompt
        return prompt if isinstance(prompt, str) else list(prompt.messages)


class Prompts:
    """A sequence of the prompts of a split, each as often as the weight of its file says."""

    def __init__(self, dataset: Dataset, documents=None):
        self.dataset = dataset  # with report, files, removed
        self._documents = dataset.documents if documents is None else documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Asked:
        document = self._documents[index]
        record, _ = self.dataset.record(document.example_id)
        return Asked(record, self.dataset.example(document.example_id), document.prompt)

    def order(self, step: int, prompts_per_step: int, seed: int) -> np.ndarray:
        """int64[prompts_per_step]: which prompts a step (0-based) asks, by these arguments alone.

        Every epoch is a permutation of its own; where one ends within a step, the next begins. So a run goes on from no
        more than the number of its step.
        """
        places = np.arange(step * prompts_per_step, (step + 1) * prompts_per_step)
        epochs, within = np.divmod(places, len(self))
        orders = {epoch: random_order(len(self), seed, epoch) for epoch in range(epochs[0], epochs[-1] + 1)}
        return np.array([orders[epoch][place] for epoch, place in zip(epochs, within, strict=True)])

    def hold_out(self, count: int, seed: int) -> "tuple[Prompts, Prompts]":
        """(those that stay, `count` of them drawn by the seed)."""
        return tuple(Prompts(self.dataset, part) for part in self._documents.hold_out(count, seed))


def open_prompts(config, model: Model) -> tuple[Prompts, Prompts | None]:
    """(prompts to train on, to evaluate on), in any format that asks something.

    Without data.eval, `data.eval_examples` of data.train are held out. Of prompts longer than rollout.max_prompt_tokens
    data.on_long says whether they are dropped, which is counted and told, or lose their beginning. data.quality leaves
    out of data.train what it names. Raises DataError, which names file and line.
    """
    if planned.current():
        return None, None
    longest = config.rollout.max_prompt_tokens
    train = Prompts(setup.open_prompts(config, model, "train", longest))
    if config.data.eval is not None:
        return train, Prompts(setup.open_prompts(config, model, "eval", longest))
    return train.hold_out(config.data.eval_examples, config.run.seed) if config.data.eval_examples else (train, None)


def read_prompts(source: Source, model: Model, settings: Sampling) -> list[Asked]:
    """All prompts of a source, of any formats, rendered with the generation prompt.

    Raises DataError, which names file and line, for a record that asks nothing and for a prompt that does not fit.
    """
    whole = {"template": model.template, "tokenizer": model.tokenizer, "max_tokens": ANY_LENGTH}
    found = []
    for index in range(len(source)):
        record, origin = source[index]
        example = question(record, origin)
        tokens = encode(example, index, **whole, on_long="drop").documents[0].prompt
        check_prompts([tokens], settings, model.policy.config.max_positions, [origin])
        found.append(Asked(record, example, tokens))
    return found
