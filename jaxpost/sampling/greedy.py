"""Greedy decoding, for a look at what a model says before and after training."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.models.policy import Policy
from jaxpost.ops.logprobs import logits
from jaxpost.types import Array, Completion

BUCKET = 16  # prompt lengths are rounded up to 16, 32, 64, ...: one compilation serves many prompts


def greedy(
    policy: Policy, params: Any, prompts: Sequence[Array], max_new_tokens: int, stop_ids: Sequence[int]
) -> list[Completion]:
    """The most likely continuation of each prompt (int32[P], P >= 1), with its log-probabilities (nats).

    A completion ends with the first of `stop_ids`, which is part of it, or after `max_new_tokens`.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("greedy: a prompt holds no token")
    if not prompts:
        return []
    count, devices = len(prompts), max(1, jax.sharding.get_abstract_mesh().size)
    prompts = [*prompts, *[prompts[-1]] * (-count % devices)]  # rows are split over the mesh: a multiple of it
    longest = max(len(prompt) for prompt in prompts)
    width = BUCKET * 2 ** max(0, (longest - 1) // BUCKET).bit_length()
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt  # padded on the left: all prompts end in the same slot
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    stops = np.asarray(sorted(stop_ids), np.int32)
    new, logps, lengths = jax.device_get(_generate(policy, max_new_tokens, params, tokens, positions, stops))
    return [
        Completion(new[i, :n], logps[i, :n], "stop" if new[i, n - 1] in stop_ids else "length")
        for i, n in enumerate(lengths[:count])
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(policy, max_new_tokens, params, tokens, positions, stops):
    B, width = tokens.shape
    head = policy.head(params)

    def pick(hidden):
        scores = logits(hidden[:, -1], head)
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return token, jnp.max(jax.nn.log_softmax(scores, axis=-1), axis=-1)

    def go_on(state):
        n, _, _, _, done, _, _ = state
        return (n < max_new_tokens) & ~done.all()

    def step(state):
        n, token, logp, lengths, done, out, cache = state
        out = (out[0].at[:, n].set(token), out[1].at[:, n].set(logp))
        lengths = lengths + ~done
        done = done | (token[:, None] == stops[None]).any(1)
        hidden, cache = policy.decode(params, token[:, None], (positions[:, -1:] + 1 + n), cache)
        token, logp = pick(hidden)
        return n + 1, token, logp, lengths, done, out, cache

    hidden, cache = policy.decode(params, tokens, positions, policy.new_cache(B, width + max_new_tokens))
    empty = (jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros((B, max_new_tokens), jnp.float32))
    start = (jnp.int32(0), *pick(hidden), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), empty, cache)
    _, _, _, lengths, _, out, _ = jax.lax.while_loop(go_on, step, start)
    return *out, lengths
