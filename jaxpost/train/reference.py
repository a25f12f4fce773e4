"""Reference log-probabilities: computed once, cached on disk, reused across epochs and runs."""

import dataclasses
import functools
import hashlib
import logging

import jax
from etils import epath

from jaxpost.data.loader import Loader
from jaxpost.data.rows import gather_completions
from jaxpost.data.values import ValueStore, attach, key
from jaxpost.sharding import batch_sharding
from jaxpost.train.objectives import token_logps_of
from jaxpost.train.progress import track
from jaxpost.train.setup import Data, Model, cache_folder

log = logging.getLogger("jaxpost")
NAME = "reference_logps"
VERSION = 1  # of what is stored: raise it when token log-probabilities change their meaning


def with_reference(data: Data, config, mesh, reference: Model, chunk: int) -> Data:
    """`data` whose documents carry `token["reference_logps"]`, read from the cache or computed and cached.

    The key of the cache covers the reference's weights and type, the tokens' sources, template and truncation.
    """
    identity = {
        "version": VERSION,
        "model": fingerprint(reference.path),
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


def fingerprint(folder: epath.Path) -> str:
    """Digest of a model folder's config and weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors"), key=lambda path: path.name):
        with path.open("rb") as file:
            digest.update(path.name.encode())
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


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
    loader = Loader(
        documents,
        rows_per_step=config.batch.rows_per_step // config.batch.accumulate,
        tokens_per_row=config.batch.tokens_per_row,
        documents_per_row=config.batch.documents_per_row,
        branches=2,
        seed=0,
        shuffle=False,
        epochs=1,
    )
    logps = jax.jit(lambda params, rows: token_logps_of(policy, params, rows, chunk=chunk))
    store = ValueStore.for_documents(documents)
    for step in track(range(loader.steps_in_epoch(0)), "reference log-probabilities"):
        rows = loader.batch(step).rows
        values = logps(params, jax.device_put(rows, batch_sharding(mesh)))
        members = loader.rows_documents(step)
        for indices, found in zip(members, gather_completions(jax.device_get(values), rows), strict=False):
            for index, completions in zip(indices, found, strict=True):
                store[index] = completions
    return store
