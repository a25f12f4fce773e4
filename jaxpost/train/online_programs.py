"""What a planned run of a stage that samples compiles (train/planned.py): updating, prefill, decoding, scoring."""

import jax
import numpy as np

from jaxpost.data.formats import Example
from jaxpost.models.cache import Cache
from jaxpost.sampling.local import ADMITTED, LocalEngine, Slots
from jaxpost.train import planned
from jaxpost.train.prompts import Asked
from jaxpost.train.rollouts import Rollout, to_batch
from jaxpost.types import Completion, Origin


def longest(config) -> Rollout:
    """A rollout whose prompts and completions are all as long as they may be."""
    c, zeros = config.rollout, np.zeros(config.sampling.max_new_tokens, np.float32)
    drawn = Completion(zeros.astype(np.int32), zeros, "length", zeros)
    example = Example("prompt", "", (), Origin("planned", 1), "planned")
    asked = Asked({}, example, np.zeros(c.max_prompt_tokens, np.int32))
    groups = ((drawn,) * c.completions_per_prompt,) * c.prompts_per_step
    scores = np.zeros(c.prompts_per_step * c.completions_per_prompt)
    return Rollout(np.arange(c.prompts_per_step), (asked,) * c.prompts_per_step, groups, scores, {})


def online_programs(config, mesh, model, trained, rollouts, learn, shardings, state, frozen) -> list[planned.Program]:
    """Of a step of the longest prompts and completions."""
    c = config.rollout
    rollout = longest(config)
    branches = {"branches": c.completions_per_prompt, "minibatches": config.ppo.minibatches}
    batch, microbatches = to_batch(rollout, config.batch, **branches)
    batch = planned.as_shapes(batch, mesh)
    parts = microbatches * config.ppo.minibatches
    trunks = 2 if config.value.model == "own" else 1
    rows, tokens = batch.rows.tokens.shape
    update = planned.Program(
        "update",
        jax.jit(learn(microbatches), donate_argnums=0, out_shardings=(shardings, None)),
        (state, frozen, batch),
        ledger={**planned.of_state(state), **frozen, "batch": batch},
        calls=1,
        policy=model.policy,
        rows=(rows // parts, tokens),
        passes=parts * ((1 + 3 * config.ppo.epochs) * trunks + 1),  # of the reference
        trained=state.params,
        trunks=trunks,
        microbatches=microbatches,
    )
    scorers = [rollouts.scorer, *getattr(rollouts.scorer, "scorers", ()), rollouts.gold]
    models = [scorer for scorer in scorers if getattr(scorer, "model", None) is not None]
    return [
        update,
        *sampling_programs(config, model, state, frozen, rollouts),
        *(scorer.program(config.batch.rows_per_step, config.batch.tokens_per_row, mesh) for scorer in models),
    ]


def sampling_programs(config, model, state, frozen, rollouts) -> list[planned.Program]:
    """What the engine of a planned run compiles, none where a server draws."""
    engine, c = rollouts.engine, config.rollout
    if not isinstance(engine, LocalEngine):
        return []
    count, slots = c.prompts_per_step * c.completions_per_prompt, engine.rounded(engine.slots)
    rows, piece = engine.rounded(engine.prefill_rows), min(engine.prefill_tokens, engine.context)
    new = config.sampling.max_new_tokens
    calls = {
        "prefill": -(-c.prompts_per_step // rows) * -(-c.max_prompt_tokens // piece),
        "admit": -(-count // ADMITTED),
        "decode": -(-count // slots) * -(-new // engine.block_steps),
    }
    shapes = {"prefill": (rows, piece), "admit": (ADMITTED, 0), "decode": (slots, 1)}
    passes = {"prefill": 1, "admit": 0, "decode": engine.block_steps}
    found = []
    whole = model.policy.whole(state.params["policy"], frozen)
    for name, fn, args in engine.programs(whole, rollouts.settings, engine.context):
        caches = [arg for arg in args if isinstance(arg, Cache | Slots)]
        ledger = {"KV cache": caches} if name == "admit" else {"policy": args[0], "KV cache": caches}
        found.append(planned.Program(name, fn, args, ledger, calls[name], model.policy, shapes[name], passes[name]))
    return found
