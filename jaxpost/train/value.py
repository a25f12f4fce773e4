"""The value model of PPO: a model of its own, or a scalar head on the policy's hidden states."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost.errors import ConfigError
from jaxpost.models.policy import Policy
from jaxpost.sharding import named_shardings, with_dtype
from jaxpost.train.folder import is_run
from jaxpost.train.scoring import is_function
from jaxpost.train.setup import Model, open_model
from jaxpost.types import Array, Rows


@dataclasses.dataclass(frozen=True)
class ValueModel:
    """policy: of scalar heads, its own trunk beneath; None: `score.weight` [1, D] reads the hidden states of another.

    abstract, shardings, axes: of its parameters. load: () -> the first of them, in their shards.
    """

    policy: Policy | None
    abstract: Any
    shardings: Any
    axes: Any
    load: Callable[[], Any]

    def values(self, params: Any, hidden: Array, rows: Rows) -> Array:
        """f32[B, T]: the value of the state before each token. hidden [B, T, D]: of the policy whose rows these are."""
        if self.policy is not None:
            hidden, _ = self.policy.hidden(params, rows)
        weight = params["score"]["weight"][0].astype(hidden.dtype)
        scores = jnp.einsum("btd,d->bt", hidden, weight, preferred_element_type=jnp.float32)
        return jnp.roll(scores, 1, axis=1)  # the token before t is the one whose state is followed by t (types.Rows)


def open_value(config, model: Model, mesh) -> ValueModel:
    """The value model that `config.value` describes; a fresh head says 0. Raises ConfigError, CheckpointError."""
    if config.value.model == "head":
        return _head(config, model, mesh)
    rewards = [spec for spec in config.score.reward if not is_function(spec)]
    path = config.value.path or next(iter(rewards), config.model.path)
    path = f"{path}/export" if is_run(path) else path
    found = open_model(config, mesh, path=path, any_head=True)
    if found.policy.config.vocab_size != model.policy.config.vocab_size:
        raise ConfigError(
            f"value.path: {path} has a vocabulary of {found.policy.config.vocab_size} tokens, the policy one of "
            f"{model.policy.config.vocab_size}; both must read the same tokens"
        )
    heads, norm = found.policy.config.num_scores, found.policy.config.score_norm
    policy = dataclasses.replace(
        found.policy, config=dataclasses.replace(found.policy.config, num_scores=1, score_norm=())
    )
    abstract = with_dtype(policy.abstract(), config.precision.params)
    shardings = named_shardings(policy.axes(), mesh, abstract)

    def load():
        params = dict(found.load())
        params.pop("head", None)  # of words
        weight = jnp.zeros((1, policy.config.embed_dim), config.precision.params)
        if heads:  # the mean of an ensemble's heads, in the units of its normalised scores
            spreads = jnp.asarray([spread for _, spread in norm] or [1.0] * heads)[:, None]
            weight = (params["score"]["weight"] / spreads).mean(0, keepdims=True).astype(weight.dtype)
        params["score"] = {"weight": jax.device_put(weight, shardings["score"]["weight"])}
        return params

    return ValueModel(policy, abstract, shardings, policy.axes(), load)


def _head(config, model: Model, mesh) -> ValueModel:
    shape = (1, model.policy.config.embed_dim)
    abstract = {"score": {"weight": jax.ShapeDtypeStruct(shape, config.precision.params)}}
    axes = {"score": {"weight": ("scores", "embed")}}
    shardings = named_shardings(axes, mesh, abstract)
    load = lambda: jax.tree.map(lambda a, s: jnp.zeros(a.shape, a.dtype, device=s), abstract, shardings)  # noqa: E731
    return ValueModel(None, abstract, shardings, axes, load)
