"""The engine that a stage draws from, as config.sampling describes it."""

import os
import shutil

from jaxpost.errors import ConfigError
from jaxpost.models import hf
from jaxpost.sampling.engine import Sampling
from jaxpost.sampling.http import HttpEngine
from jaxpost.sampling.local import LocalEngine, roomy
from jaxpost.train.setup import Model

SERVED = "served"  # folder in a run's: the weights that a server reads


def open_sampling(config, model: Model) -> Sampling:
    """How completions are drawn. Raises ConfigError."""
    c, stops = config.sampling, model.tokenizer.stop_ids
    names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
    return Sampling(**{name: getattr(c, name) for name in names}, stop_ids=stops)


def open_engine(config, model: Model, mesh) -> LocalEngine | HttpEngine:
    """Raises ConfigError where prompt and completion do not fit the model, or an environment variable is not there."""
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
        return HttpEngine(c.url, model=c.served_model, api_key=key, **names)
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


def push(engine: HttpEngine, folder, model: Model, params, step: int) -> None:
    """Has the server read these parameters (all of the policy's), written to a folder of the run's."""
    target = folder / SERVED / f"step-{step}"
    hf.export(target, params, model.policy, model.tokenizer.files() | model.template.files())
    engine.push(target)
    for old in (folder / SERVED).glob("step-*"):
        if old != target:
            shutil.rmtree(old)
