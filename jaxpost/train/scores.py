"""Scores of completions by a reward model: in a batch, of documents, of any tokens; and their normalisation."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.data.encode import encode
from jaxpost.data.formats import Example
from jaxpost.data.loader import Loader
from jaxpost.errors import ConfigError, DataError
from jaxpost.ops.completions import completion_ends
from jaxpost.sharding import batch_shards, fetch, place
from jaxpost.types import Array, Batch, Conversation, Document, Origin

ROWS, NARROWEST, DOCUMENTS_PER_ROW = 8, 64, 64  # of the rows in which loose documents are scored


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of C completions by an ensemble of R heads (of one model, or of several: `joined`)."""

    heads: np.ndarray  # f32[C, R]

    @property
    def mean(self) -> np.ndarray:
        """f32[C]"""
        return self.heads.mean(axis=1)

    @property
    def min(self) -> np.ndarray:
        """f32[C]: of the most doubtful head."""
        return self.heads.min(axis=1)

    @property
    def spread(self) -> np.ndarray:
        """f32[C]: standard deviation over the heads; 0 of one."""
        return self.heads.std(axis=1)


def joined(scores: Sequence[Scores]) -> Scores:
    """The scores of several models for the same completions, as one ensemble: runs of k seeds, say."""
    return Scores(np.concatenate([one.heads for one in scores], axis=1))


def completion_scores(policy, params, batch: Batch, key: Array | None = None) -> tuple[Array, Array | None]:
    """(f32[B, M, N, R] read at the last token of each completion, 0 where there is none; what the routers said)."""
    mask = batch.completion["mask"]
    hidden, router = policy.hidden(params, batch.rows, key)
    ends = completion_ends(batch.rows, *mask.shape[1:])
    last = jnp.take_along_axis(hidden, ends.reshape(len(ends), -1, 1), axis=1)
    scores = policy.scores(params, last).reshape(*mask.shape, -1)
    return scores * mask[..., None], router


@functools.partial(jax.jit, static_argnums=0)
def batch_scores(policy, params, batch: Batch) -> Array:
    return completion_scores(policy, params, batch)[0]


def loader_scores(policy, params, mesh, loader: Loader) -> np.ndarray:
    """f32[documents, N, R]: scores, not normalised, of one pass of the loader; NaN where there is no completion."""
    # One program, however the scores are normalised.
    policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, score_norm=()))
    found = np.full((len(loader.documents), loader.branches, policy.config.num_scores), np.nan, np.float32)
    with jax.set_mesh(mesh):
        for step in range(loader.steps_in_epoch(0)):
            batch = loader.batch(step)
            scores = fetch(batch_scores(policy, params, place(batch, mesh)))
            scores = np.where(batch.completion["mask"][..., None] > 0, scores, np.nan)
            for indices, of_row in zip(loader.rows_documents(step), scores, strict=False):
                found[indices] = of_row[: len(indices)]
    return found


def score_documents(policy, params, mesh, documents: Sequence[Document]) -> Scores:
    """Scores of all completions of the documents, in order; normalised where the model says how."""
    if not policy.config.num_scores:
        raise ConfigError("the model has words for a head, not scores; train it with stage=reward first")
    if not documents:
        return Scores(np.zeros((0, policy.config.num_scores), np.float32))
    costs, shards = [document.cost for document in documents], batch_shards(mesh)
    width = _power_of_two(max(NARROWEST, *costs))  # few widths, so few programs
    rows = shards * min(ROWS, _power_of_two(-(-sum(costs) // (width * shards))))
    shape = {"rows_per_step": rows, "tokens_per_row": width, "documents_per_row": DOCUMENTS_PER_ROW}
    most = max(len(document.completions) for document in documents)
    loader = Loader(documents, **shape, branches=most, seed=0, shuffle=False, epochs=1)
    scores = loader_scores(policy, params, mesh, loader)
    held = np.arange(most) < np.array([len(document.completions) for document in documents])[:, None]
    return Scores(normalized(scores[held], policy.config.score_norm))


def token_documents(sequences: Sequence[Sequence[int]], longest: int) -> list[Document]:
    """Token sequences to be scored, each at its last token. Raises DataError for an empty or over-long one."""
    documents = []
    for index, tokens in enumerate(np.asarray(tokens, np.int32) for tokens in sequences):
        if not 0 < len(tokens) <= longest:
            raise DataError(f"sequence {index + 1}: {len(tokens)} tokens; the model scores 1 to {longest}")
        nothing = np.zeros(len(tokens) - 1, np.float32)
        documents.append(Document(tokens[:1], (tokens[1:],), (nothing,), index, Origin("sequence", index + 1)))
    return documents


def answer_document(prompt: Conversation, text: str, origin: Origin, index: int = 0, **encoding) -> Document:
    """An answer to a conversation, rendered and tokenised as in training.

    encoding: template, tokenizer and max_tokens, as of `encode`. Raises DataError for what cannot be read.
    """
    answer = ({"role": "assistant", "content": text},)
    example = Example("unpaired", prompt, (answer,), origin, "unpaired")
    return encode(example, index, **encoding, on_long="drop").documents[0]


def normalized(scores: np.ndarray, norm) -> np.ndarray:
    """(scores - mean) / spread of each head, [..., R]; as they are where `norm` is empty."""
    if not norm:
        return scores
    mean, spread = np.array(norm, np.float32).T
    return (scores - mean) / spread


def normalization(scores: np.ndarray) -> tuple[tuple[float, float], ...]:
    """(mean, spread) of each head from its scores [C, R], such that the heads' mean gets mean 0 and spread 1.

    Reward models are shifted and scaled so since Ziegler et al. 2019, arXiv:1909.08593, section 2. () where a head
    scores everything alike, as a fresh one does.
    """
    scores = scores.astype(np.float64)
    mean, spread = scores.mean(axis=0), scores.std(axis=0)
    if not (np.isfinite(spread) & (spread > 0)).all():
        return ()
    common = ((scores - mean) / spread).mean(axis=1).std()  # below 1 where heads disagree
    return tuple(zip(mean.tolist(), (spread * common).tolist(), strict=True)) if common > 0 else ()


def _power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()
