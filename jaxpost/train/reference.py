"""Reference log-probabilities: computed once, cached on disk, reused across epochs and runs."""

import dataclasses
import functools
import logging

import jax
from etils import epath

from jaxpost.data.rows import gather_completions
from jaxpost.data.values import ValueStore, attach, key
from jaxpost.sharding import batch_sharding
from jaxpost.train.inputs import model_files
from jaxpost.train.objectives import token_logps_of
from jaxpost.train.progress import track
from jaxpost.train.setup import Data, Model, cache_folder, one_pass

log = logging.getLogger("jaxpost")
NAME = "reference_logps"
VERSION = 1  # of what is stored: raise it when token log-probabilities change their meaning


def with_reference(data: Data, config, mesh, reference: Model, chunk: int) -> Data:
    """`data` whose documents carry `token["reference_logps"]`, read from the cache or computed and cached.

    The key of the cache covers the reference's weights and type, the tokens' sources, template and truncation.
    """
    identity = {
        "version": VERSION,
        "model": model_files(reference),
        "dtype": reference.policy.compute_dtype,
        **data.identity,
    }
    load = functools.cache(reference.load)  # once for both parts, and not at all when both are cached
    parts = {"train": data.train, "eval": data.eval}
    for name, documents in parts.items():
        if documents is not None:
            digest = key(part=name, **identity)
            parts[name] = attach(documents, NAME, _store(documents, digest, config, mesh, reference, load, chunk))
    return dataclasses.replace(data, **parts)


def _store(documents, digest: str, config, mesh, reference: Model, load, chunk: int) -> ValueStore:
    folder = epath.Path(config.reference.cache_dir) if config.reference.cache_dir else cache_folder() / "values"
    path = folder / f"{NAME}-{digest[:32]}"
    store = ValueStore.open(path, digest)
    if store is not None:
        log.info("reference log-probabilities of %d documents read from %s", len(documents), path)
        return store
    with jax.set_mesh(mesh):
        store = compute_logps(documents, config, reference.policy, load(), mesh, chunk)
    store.save(path, digest)
    return store


def compute_logps(documents, config, policy, params, mesh, chunk: int) -> ValueStore:
    """f32[C_n] of each completion, by packing all documents into rows once."""
    loader = one_pass(config, documents, branches=2)
    logps = jax.jit(lambda params, batch: token_logps_of(policy, params, batch, chunk=chunk))
    store = ValueStore.for_documents(documents)
    for step in track(range(loader.steps_in_epoch(0)), "reference log-probabilities"):
        batch = loader.batch(step)
        values = logps(params, jax.device_put(batch, batch_sharding(mesh)))
        members = loader.rows_documents(step)
        for indices, found in zip(members, gather_completions(jax.device_get(values), batch.rows), strict=False):
            for index, completions in zip(indices, found, strict=True):
                store[index] = completions
    return store
