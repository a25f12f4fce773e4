"""What an engine is: prompts, settings and a key in, completions with their log-probabilities out.

Two engines there are: `local` (in this process, jitted, on the mesh that trains) and `http` (an OpenAI-compatible
server). Tokens in, tokens out: nothing that is sampled is ever rendered and tokenised again.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxpost.errors import ConfigError, DataError
from jaxpost.types import Completion


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Raises ConfigError, which names the field, for what cannot be.

    Logits of the head are taken in this order: the repetition penalty, logit_bias, what is not allowed (a stop before
    min_new_tokens, tokens outside of choices), the temperature, then top_k, top_p and min_p on what is left, each of
    which keeps all tokens that are as likely as the last one kept.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0  # no stop token is drawn before
    temperature: float = 1.0  # 0: the likeliest token (greedy)
    top_k: int | None = None  # the k likeliest
    top_p: float = 1.0  # the fewest whose probabilities sum to at least p (nucleus, arXiv:1904.09751)
    min_p: float = 0.0  # those at least min_p times as likely as the likeliest (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # of tokens in prompt or completion (CTRL, arXiv:1909.05858, section 4.1)
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    stop_ids: tuple[int, ...] = ()  # tokens that end a completion, and are part of it
    stop: tuple[str, ...] = ()  # strings whose appearance ends it; the token that completes one is its last
    choices: tuple[tuple[int, ...], ...] | None = None  # it is one of these (token ids); a stop ends what could go on

    def __post_init__(self):
        def check(name, right, wanted):
            if not right:
                raise ConfigError(f"sampling.{name}: {getattr(self, name)!r} is out of range; expected {wanted}")

        check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        check("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens")
        check("temperature", 0 <= self.temperature < np.inf, "at least 0")
        check("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None")
        check("top_p", 0 < self.top_p <= 1, "above 0, at most 1")
        check("min_p", 0 <= self.min_p <= 1, "0 to 1")
        check("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0; 1 is none")
        check("stop", all(self.stop), "strings that are not empty")
        check("choices", self.choices is None or (self.choices and all(self.choices)), "choices of at least one token")

    @property
    def filtered(self) -> bool:
        """Whether tokens are drawn from anything but softmax(logits / temperature)."""
        return self != Sampling(
            **{name: getattr(self, name) for name in ("max_new_tokens", "temperature", "stop_ids", "stop")}
        )


class Engine(Protocol):
    """What samples."""

    def stream(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        key,
        *,
        settings: Sampling,
        completions: int = 1,
        indices: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Yields (n, the completions of prompts[n]) as they are finished, which is not the order of the prompts.

        Args:
          params: of the policy, as it trains now; an engine that holds weights of its own ignores them.
          prompts: int32[P] each, at least one token.
          key: typed. What is drawn for a prompt depends on it, on the prompt's index and on the number of the
            completion alone: not on what else is asked for.
          completions: G, of each prompt.
          indices: which prompts of the data these are; None: 0, 1, ... Two prompts of one index draw alike.

        Raises DataError for a prompt that does not fit, before anything is drawn.
        """
        ...


def sample(engine: Engine, params, prompts, key, **kwargs) -> list[tuple[Completion, ...]]:
    """`Engine.stream` to its end, in the order of the prompts."""
    found = dict(engine.stream(params, prompts, key, **kwargs))
    return [found[n] for n in range(len(prompts))]


def check_prompts(prompts: Sequence[np.ndarray], settings: Sampling, context: int, indices=None) -> None:
    """Raises DataError for an empty prompt, or one that leaves no room in a context of so many tokens."""
    for n, prompt in enumerate(prompts):
        name = f"prompt {n if indices is None else indices[n]}"
        if not len(prompt):
            raise DataError(f"{name}: empty; a completion continues at least one token")
        if len(prompt) + settings.max_new_tokens > context:
            raise DataError(
                f"{name}: {len(prompt)} tokens and sampling.max_new_tokens = {settings.max_new_tokens} are more than "
                f"the {context} that there is room for; shorten it, or lower sampling.max_new_tokens"
            )


def until_stop(tokens: list[int], decode, stop: Sequence[str]) -> int | None:
    """Tokens up to the one that completes the first of the stop strings in their text; None where there is none.

    decode: token ids -> text. Texts of beginnings are searched, so a string that spans tokens is found as well.
    """
    text = decode(tokens)
    if not any(string in text for string in stop):
        return None
    low, high = 1, len(tokens)  # the shortest beginning whose text holds one: holding it is monotone
    while low < high:
        middle = (low + high) // 2
        if any(string in decode(tokens[:middle]) for string in stop):
            high = middle
        else:
            low = middle + 1
    return low


def visible_text(completion: Completion, tokenizer, settings: Sampling) -> str:
    """What a reader sees of a completion: without the stop token, and cut before a stop string."""
    tokens = [int(token) for token in completion.tokens]
    if tokens[-1:] and tokens[-1] in settings.stop_ids:
        tokens.pop()
    text = tokenizer.decode(tokens)
    places = [text.find(string) for string in settings.stop if string in text]
    return text[: min(places)] if places else text
