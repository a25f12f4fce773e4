"""What a run leaves in the hands of its user: weights, metrics, and a model to talk to."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxpost.models.hf import export
from jaxpost.sampling.greedy import greedy
from jaxpost.train.setup import Model


@dataclasses.dataclass
class Run:
    """A stage's result. `metrics` maps each name to arrays `step` and values, one entry a logged row."""

    folder: epath.Path
    model: Model
    mesh: Any
    state: Any
    rows: list[dict]
    finished: bool = True  # False: stopped by SIGTERM, saved, to be resumed
    evaluation: Any = None  # () -> {name: value}

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """{name: f64[n, 2]}: (step, value) of each row of metrics.jsonl that has the name."""
        found: dict[str, list] = {}
        for row in self.rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    found.setdefault(name, []).append((row["step"], value))
        return {name: np.array(values, np.float64) for name, values in found.items()}

    def chat(self, prompt: str | list[dict], max_new_tokens: int = 128) -> str:
        """The model's greedy answer to a user's words, or to a list of messages."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return answer(self.model, self.state.params, self.mesh, [messages], max_new_tokens)[0]

    def evaluate(self) -> dict[str, float]:
        """Metrics of the present weights on the evaluation data."""
        return self.evaluation()

    def export(self, path) -> None:
        """Writes the weights in Hugging Face layout, with config and tokenizer files."""
        export(path, self.state.params, self.model.policy, self.model.tokenizer.files())


def prompt_ids(model: Model, messages: list[dict]) -> np.ndarray:
    """Token ids of a conversation up to where the assistant answers, BOS once."""
    return np.asarray(model.template.encode(messages, model.tokenizer, add_generation_prompt=True), np.int32)


def answer(model: Model, params, mesh, conversations: list[list[dict]], max_new_tokens: int) -> list[str]:
    """Greedy answers to conversations that end with a user's turn."""
    return complete(model, params, mesh, [prompt_ids(model, c) for c in conversations], max_new_tokens)


def complete(model: Model, params, mesh, prompts: list[np.ndarray], max_new_tokens: int) -> list[str]:
    """Greedy continuations of token ids, as text."""
    room = model.policy.config.max_positions
    prompts = [p[-(room - max_new_tokens) :] for p in prompts]
    with jax.set_mesh(mesh):
        found = greedy(model.policy, params, prompts, max_new_tokens, model.tokenizer.stop_ids)
    return [model.tokenizer.decode(c.tokens.tolist()).strip() for c in found]
