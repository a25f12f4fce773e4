"""Values of every token of a data set, from one pass over its documents in packed rows."""

from collections.abc import Callable, Sequence

import jax

from jaxpost.data.rows import gather_completions
from jaxpost.data.values import ValueStore
from jaxpost.sharding import fetch, place
from jaxpost.train.progress import track
from jaxpost.train.setup import one_pass


def fill(stores: Sequence[ValueStore], documents, function: Callable, config, mesh, branches: int, what: str) -> None:
    """Sets every item of the stores: of each, what `function` gives of a batch, an array [B, T, ...] a store.

    branches: completions of a document, 0 where all are linear. what: for the bar.
    """
    loader = one_pass(config, documents, branches)
    for step in track(range(loader.steps_in_epoch(0)), what):
        batch, members = loader.batch(step), loader.rows_documents(step)  # whole: values of all rows come back
        with jax.set_mesh(mesh):
            values = fetch(function(place(batch, mesh)))
        for store, found in zip(stores, values, strict=True):
            for indices, row in zip(members, gather_completions(found, batch.rows), strict=False):
                for index, completions in zip(indices, row, strict=True):
                    store[index] = completions
