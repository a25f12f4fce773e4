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
from jaxpost.train import setup
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

    def __init__(self, dataset: Dataset):
        self.dataset = dataset  # with report, files, removed

    def __len__(self) -> int:
        return len(self.dataset.documents)

    def __getitem__(self, index: int) -> Asked:
        document = self.dataset.documents[index]
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


def open_prompts(config, model: Model, split: str, longest: int) -> Prompts:
    """The prompts of data.train or data.eval (split "train", "eval"), in any format that asks something.

    longest: most tokens of a prompt; data.on_long says whether a longer one is dropped, which is counted and told, or
    loses its beginning. Of "train", data.quality leaves out what it names. Raises DataError, which names file and line.
    """
    return Prompts(setup.open_prompts(config, model, split, longest))


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
