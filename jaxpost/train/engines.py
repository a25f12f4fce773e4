"""The engine that a stage draws from, as config.sampling describes it."""

import os

from jaxpost.errors import ConfigError
from jaxpost.models import lora
from jaxpost.sampling.engine import Sampling
from jaxpost.sampling.http import HttpEngine
from jaxpost.sampling.local import LocalEngine, roomy
from jaxpost.train.checkpoint import checksum
from jaxpost.train.run import LoadedModel
from jaxpost.train.setup import Model

SERVED = "served"  # folder in a run's: the weights that a server reads


class ServedEngine:
    """An `Engine` on a server, which gets the weights it is asked to draw by before it draws.

    They go as a whole model, adapters worked in, to a folder beneath `folder`, whose predecessor is then removed; the
    weights that it got last it does not get again.
    """

    def __init__(self, server: HttpEngine, model: Model, mesh, folder):
        self.server, self.model, self.mesh = server, model, mesh
        self.folder = folder.resolve()  # the server has another working directory
        self._pushed = None  # what tells those weights from others

    def stream(self, params, prompts, key, **kwargs):
        """As `Engine.stream`. Raises EngineError."""
        self._push(params)
        yield from self.server.stream(params, prompts, key, **kwargs)

    def _push(self, params) -> None:
        adapted = self.model.policy.lora is not None
        identity = checksum(lora.split(params)[1] if adapted else params)
        if identity == self._pushed:
            return
        target = self.folder / f"{identity:08x}"
        LoadedModel(self.model, params, self.mesh).export(target, merge=adapted)
        self.server.push(target)
        self._pushed = identity
        for other in self.folder.iterdir():
            if other != target:
                other.rmtree()


def open_sampling(config, model: Model) -> Sampling:
    """How completions are drawn. Raises ConfigError."""
    c, stops = config.sampling, model.tokenizer.stop_ids
    names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
    return Sampling(**{name: getattr(c, name) for name in names}, stop_ids=stops)


def open_engine(config, model: Model, mesh, folder) -> LocalEngine | ServedEngine:
    """folder: the run's. Raises ConfigError where prompt and completion do not fit the model, or a key is missing."""
    c, longest = config.sampling, config.rollout.max_prompt_tokens + config.sampling.max_new_tokens
    most = model.policy.config.max_positions
    if longest > most:
        prompt = f"rollout.max_prompt_tokens={config.rollout.max_prompt_tokens}"
        raise ConfigError(
            f"sampling.max_new_tokens: {c.max_new_tokens} and {prompt} are more than the {most} tokens that the model "
            "was trained for; lower one of them"
        )
    if c.engine == "http":
        key = None
        if c.api_key_env is not None:
            key = os.environ.get(c.api_key_env)
            if not key:
                raise ConfigError(f"sampling.api_key_env: there is no environment variable {c.api_key_env}")
        names = {name: getattr(c, name) for name in ("concurrency", "timeout_s", "retries", "reload")}
        server = HttpEngine(c.url, model=c.served_model, api_key=key, **names)
        return ServedEngine(server, model, mesh, folder / SERVED)
    return LocalEngine(
        model.policy,
        mesh,
        slots=c.slots,
        context=min(roomy(longest), most),  # whatever the prompts of a step are: its programs are the same
        prefill_rows=c.prefill_rows,
        prefill_tokens=c.prefill_tokens,
        block_steps=c.block_steps,
        quantized=c.kv_cache == "int8",
        decode=model.tokenizer.decode,
    )
