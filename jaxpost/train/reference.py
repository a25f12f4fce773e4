"""Reference models: whose log-probabilities a loss compares the policy's with, and where these come from.

cached: computed once, kept on disk, reused across epochs and runs. live: of weights in `frozen`, in every step.
moving: of weights in the carry, which follow the policy.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxpost import __version__
from jaxpost.data.values import ValueStore, attach, key
from jaxpost.errors import ConfigError
from jaxpost.train import hosts, planned
from jaxpost.train.inputs import model_files
from jaxpost.train.objectives import cached_reference, token_logps_of
from jaxpost.train.per_token import fill
from jaxpost.train.setup import Data, Model, cache_folder, open_reference, train_loader
from jaxpost.train.step import Carry

log = logging.getLogger("jaxpost")
NAME = "reference_logps"
VERSION = 1  # of what is stored: raise it when token log-probabilities change their meaning


@dataclasses.dataclass(frozen=True)
class Reference:
    """What an objective asks of a reference, and what a stage gives to `fit` for it.

    logps: (frozen, carry, batch) -> f32[B, T], the log-probability of each trained token.
    """

    logps: Callable[[Any, Any, Any], jax.Array]
    frozen: dict[str, Any] | None = None
    carry: Carry | None = None


def attach_reference(config, model: Model, mesh, data: Data, chunk: int) -> tuple[Data, Reference]:
    """(the data, whose documents carry cached log-probabilities where reference.mode says so; the reference)."""
    opened = open_reference(config, model, mesh)
    if config.reference.mode == "cached":
        if planned.current():
            return with_placeholders(data, NAME), Reference(cached_reference)
        return with_reference(data, config, mesh, opened, chunk), Reference(cached_reference)
    if config.reference.mode == "live":

        def live(frozen, carry, batch):
            return token_logps_of(opened.policy, frozen["reference"], batch, chunk=chunk)

        return data, Reference(live, frozen={"reference": opened.load()})
    if model.base is not None and config.reference.path is None:
        opened = model  # adapters follow adapters, over one base

    def moving(frozen, carry, batch):
        params = opened.policy.whole(carry["reference"], frozen)
        return token_logps_of(opened.policy, params, batch, chunk=chunk)

    return data, Reference(moving, carry=following(config, model, opened, data))


def with_placeholders(data: Data, *names: str, shape: tuple[int, ...] = (), dtype=np.float32) -> Data:
    """`data` of a planned run whose tokens carry these values."""

    def carrying(document):
        values = tuple(np.zeros((len(completion), *shape), dtype) for completion in document.completions)
        return dataclasses.replace(document, token=document.token | dict.fromkeys(names, values))

    return dataclasses.replace(data, train=[carrying(document) for document in data.train])


def following(config, model: Model, reference: Model, data: Data) -> Carry:
    """The carry of a reference that begins as `reference` and follows the policy. Raises ConfigError."""
    alpha, every = config.reference.alpha, config.reference.every
    shapes = lambda opened: jax.tree.map(lambda leaf: leaf.shape, opened.abstract)  # noqa: E731
    if shapes(reference) != shapes(model):
        raise ConfigError("reference.path: has other parameters than model.path, and cannot follow it; set mode='live'")
    steps = config.run.steps or train_loader(config, data).total_steps(config.run.epochs)
    if every >= steps:
        raise ConfigError(f"reference.every: {every} updates, but the run has {steps}: the reference would never move")
    if alpha < 0.1 and any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(reference.abstract)):
        lost = f"differences of less than {100 * 2**-9 / alpha:.2g} % of a weight never reach the reference"
        log.warning("reference.alpha=%g: in bfloat16 %s; set precision.reference='float32'", alpha, lost)
    return Carry(
        {"reference": reference.sharded},
        lambda: {"reference": reference.load()},
        functools.partial(follow, alpha=alpha, every=every),
    )


def follow(carry, params, metrics, applied, *, alpha: float, every: int):
    """After every `every` updates: reference = alpha * policy + (1 - alpha) * reference, made in f32.

    Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment", arXiv:2404.09656: its soft update
    has `every` 1, its hard update `alpha` 1 (then `every` is its tau).
    """
    due = applied % every == 0

    def mixed(reference, param):
        new = alpha * param.astype(jnp.float32) + (1 - alpha) * reference.astype(jnp.float32)
        return jnp.where(due, new.astype(reference.dtype), reference)

    return carry | {"reference": jax.tree.map(mixed, carry["reference"], params)}


def with_reference(data: Data, config, mesh, reference: Model, chunk: int) -> Data:
    """`data` whose documents carry `token["reference_logps"]`, read from the cache or computed and cached.

    The key of the cache covers the reference's weights and types, the documents' tokens (which sources, template and
    truncation decide) and the version of this code.
    """
    identity = {
        "version": [__version__, VERSION],
        "model": model_files(reference),
        "adapter": config.model.adapter,
        "dtype": reference.policy.compute_dtype,
        "weights": sorted({str(leaf.dtype) for leaf in jax.tree.leaves(reference.abstract)}),
        "quantized": (reference.base or reference).quantized,
        **data.identity,
    }
    load = functools.cache(reference.load)  # once for both parts, and not at all when both are cached
    parts = {"train": data.train, "eval": data.eval}
    for name, documents in parts.items():
        if documents is not None:
            digest = key(part=name, **identity)

            def compute(documents=documents):
                return compute_logps(documents, config, reference.policy, load(), mesh, chunk, data.branches)

            parts[name] = attach(documents, NAME, _store(documents, digest, config, compute))
    return dataclasses.replace(data, **parts)


def _store(documents, digest: str, config, compute: Callable[[], ValueStore]) -> ValueStore:
    folder = epath.Path(config.reference.cache_dir) if config.reference.cache_dir else cache_folder() / "values"
    path = folder / f"{NAME}-{digest[:32]}"
    store = ValueStore.open(path, digest)
    if hosts.all_of(store is not None):  # each may have a cache of its own, and all take part in computing
        log.info("reference log-probabilities of %d documents read from %s", len(documents), path)
        return store
    store = compute()
    store.save(path, digest)
    return store


def compute_logps(documents, config, policy, params, mesh, chunk: int, branches: int = 2) -> ValueStore:
    """f32[C_n] of each completion, by packing all documents into rows once."""
    logps = jax.jit(lambda params, batch: (token_logps_of(policy, params, batch, chunk=chunk),))
    store = ValueStore.for_documents(documents)
    fill([store], documents, functools.partial(logps, params), config, mesh, branches, "reference log-probabilities")
    return store
