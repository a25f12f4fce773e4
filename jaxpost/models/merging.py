"""Weights of several models made into those of one, tensor by tensor, in numpy.

Notation of the papers: theta_t the weights of model t, theta_0 those of the base that all were trained from, and
tau_t = theta_t - theta_0 the task vectors.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.errors import CheckpointError, ConfigError

NEARLY_PARALLEL = 0.9995  # cosine from which on slerp is linear: dividing by the angle's sine would amplify rounding


class Method(NamedTuple):
    """What a method of merging takes."""

    fewest: int  # models beside the base
    most: float
    needs_base: bool = False
    sparse: bool = False  # drops entries of task vectors: takes a density
    random: bool = False  # takes a seed
    negative: bool = False  # weights below 0 mean something


METHODS = {
    "linear": Method(2, math.inf, negative=True),
    "slerp": Method(2, 2),
    "ties": Method(1, math.inf, needs_base=True, sparse=True),
    "dare_linear": Method(1, math.inf, needs_base=True, sparse=True, random=True, negative=True),
    "dare_ties": Method(1, math.inf, needs_base=True, sparse=True, random=True),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How models are merged. Raises ConfigError for what the method does not take.

    weights: one a model. Their sum is divided out but by dare_linear, which adds task vectors.
    density: share of each task vector, tensor by tensor, that is kept.
    scale: the factor (lambda) of the merged task vector; None: 1.
    seed: of what DARE drops; None: 0.
    """

    method: str
    weights: tuple[float, ...]
    density: float | None = None
    scale: float | None = None
    seed: int | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(f"method: {self.method!r} is unknown; there are {', '.join(METHODS)}")
        takes, count = METHODS[self.method], len(self.weights)
        if not takes.fewest <= count <= takes.most:
            wanted = "exactly" if takes.fewest == takes.most else "at least"
            raise ConfigError(f"models: {self.method} merges {wanted} {takes.fewest}, got {count}")
        self._check_weights(takes)
        if self.density is not None and not takes.sparse:
            raise ConfigError(f"density: {self.method} drops nothing; leave it out")
        if self.density is None and takes.sparse:
            raise ConfigError(f"density: missing; {self.method} keeps this share of each task vector (0 to 1)")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density: {self.density} is out of range; expected 0 < density <= 1")
        if self.scale is not None and not takes.needs_base:
            raise ConfigError(f"scale: {self.method} has no task vectors; leave it out")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ConfigError(f"scale: {self.scale} is not a finite number")
        if self.seed is not None and not takes.random:
            raise ConfigError(f"seed: {self.method} draws nothing; leave it out")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed: {self.seed} is negative")

    def _check_weights(self, takes: Method) -> None:
        for weight in self.weights:
            if not math.isfinite(weight):
                raise ConfigError(f"weights: {weight} is not a finite number")
            if weight < 0 and not takes.negative:
                raise ConfigError(f"weights: {weight} is negative, which means nothing to {self.method}")
        if self.method != "dare_linear" and abs(sum(self.weights)) < 1e-9:
            raise ConfigError("weights: their sum is 0, by which they are divided")


def merge_tensors(
    recipe: Recipe,
    name: str,
    tensors: Sequence[Any],
    base: Any = None,
    *,
    shape: tuple[int, ...],
    dtype: str | np.dtype | None = None,
    block: int = 2**18,
) -> np.ndarray:
    """One tensor of the merged model from that tensor of each model, and of the base where the method needs one.

    Computed in float64, some rows at a time, and rounded once: a model merged with itself is itself to the bit. What
    DARE drops depends on the seed, the tensor's name and the model's place alone.

    Args:
      tensors, base: arrays of `shape`, or anything that gives some rows of one as `tensor[start:stop]`.
      dtype: of the result; None: that of the base, or of the first model.
      block: entries of a tensor that are worked on at a time.

    Raises:
      CheckpointError: a value of a model is not finite, or a merged one is more than `dtype` holds.
    """
    given = list(tensors) if base is None else [base, *tensors]
    rows = max(1, block // max(1, math.prod(shape[1:])))
    spans = [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]

    def blocks(*which: int) -> Iterator[list[np.ndarray]]:
        for span in spans:
            found = [given[i][span].astype(np.float64) for i in which]
            for i, values in zip(which, found, strict=True):
                if not np.isfinite(values).all():
                    model = f"model {i + (base is None)}" if i or base is None else "the base"
                    raise CheckpointError(f"tensor {name}: {model} holds a value that is not finite")
            yield found

    combine = _PREPARE[recipe.method](recipe, name, blocks, math.prod(shape))
    merged = np.empty(shape, np.dtype(dtype or given[0][:1].dtype))
    for span, found in zip(spans, blocks(*range(len(given))), strict=True):
        with np.errstate(over="ignore"):
            merged[span] = combine(found)
        if not np.isfinite(merged[span]).all():
            raise CheckpointError(f"tensor {name}: a merged value is more than {merged.dtype} holds; see dtype")
    return merged


def weighted_sum(tensors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """sum_t w_t theta_t."""
    return functools.reduce(np.add, [w * tensor for w, tensor in zip(weights, tensors, strict=True)])


def slerp_weights(cosine: float, t: float) -> tuple[float, float]:
    """The two vectors' weights, the share t of the way from one to the other along the great circle (Shoemake 1985).

    sin((1 - t) a) / sin(a) and sin(t a) / sin(a), with a the angle between them; linear where there is no angle to
    speak of: (nearly) parallel or opposed.
    """
    if abs(cosine) > NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


class Trim:
    """TIES (arXiv:2306.01708), step 1: all but the `density` largest entries of a task vector become 0.

    Called on the vector's blocks in their order. At least one entry stays; of entries alike in magnitude (in float32),
    of which there are many between bfloat16 models, the first do.
    """

    def __init__(self, blocks: Callable[[], Iterable[np.ndarray]], size: int, density: float):
        # Bit patterns of magnitudes are in the order of the magnitudes: counted by their halves, in two passes.
        high, count = _bin_of((_bits(vector) >> 16 for vector in blocks()), max(1, int(density * size)))
        within = (bits[bits >> 16 == high] & 0xFFFF for bits in map(_bits, blocks()))
        low, self._equals = _bin_of(within, count)  # so many entries of the least magnitude are kept
        self._least = high << 16 | low

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        bits = _bits(vector)
        keep = bits > self._least
        first = np.flatnonzero(bits == self._least)[: self._equals]
        keep[first] = True
        self._equals -= len(first)
        return np.where(keep.reshape(vector.shape), vector, 0)


def _bits(vector: np.ndarray) -> np.ndarray:
    return np.abs(vector).astype(np.float32).ravel().view(np.uint32)


def _bin_of(values: Iterable[np.ndarray], count: int) -> tuple[int, int]:
    """(the 16-bit value of the `count`-th largest of all, how many of its equals belong to the `count` largest)."""
    counts = sum(np.bincount(some, minlength=2**16) for some in values)
    at_least = np.cumsum(counts[::-1])
    place = int(np.searchsorted(at_least, count))
    return len(counts) - 1 - place, count - int(at_least[place] - counts[::-1][place])


def drop(vector: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """DARE (arXiv:2311.03099): each entry of a task vector stays with probability `density`, and is divided by it."""
    keep = rng.random(vector.shape, np.float32) < density
    return np.where(keep, vector / density, 0)


def disjoint_mean(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """TIES, steps 2 and 3: at each entry the sign of the larger mass, and the mean over the models that have it."""
    elected = np.sign(weighted_sum(vectors, weights))
    total, weight = np.zeros_like(elected), np.zeros_like(elected)
    for w, vector in zip(weights, vectors, strict=True):
        agrees = vector * elected > 0
        total += np.where(agrees, w * vector, 0)
        weight += np.where(agrees, w, 0)
    return total / np.where(weight > 0, weight, 1)


def _prepare_linear(recipe: Recipe, name: str, blocks: Callable, size: int) -> Callable:
    """(model soups, arXiv:2203.05482)"""
    return lambda tensors: weighted_sum(tensors, recipe.weights) / sum(recipe.weights)


def _prepare_slerp(recipe: Recipe, name: str, blocks: Callable, size: int) -> Callable:
    """The angle is that between the whole tensors as vectors; a tensor of zeros has none."""
    first, second, product = np.sum([[np.vdot(a, a), np.vdot(b, b), np.vdot(a, b)] for a, b in blocks(0, 1)], axis=0)
    norms = math.sqrt(first * second)
    weights = slerp_weights(product / norms if norms > 0 else 1.0, recipe.weights[1] / sum(recipe.weights))
    return lambda tensors: weighted_sum(tensors, weights)


def _prepare_task_vectors(recipe: Recipe, name: str, blocks: Callable, size: int) -> Callable:
    """theta_0 + lambda tau, of sparse task vectors that are added up (task arithmetic, arXiv:2212.04089) or by TIES."""
    models = range(1, len(recipe.weights) + 1)
    if recipe.method == "ties":
        vectors = lambda i: lambda: (tensor - base for base, tensor in blocks(0, i))  # noqa: E731
        sparse = [Trim(vectors(i), size, recipe.density) for i in models]
    else:
        seeds = ([recipe.seed or 0, i, zlib.crc32(name.encode())] for i in models)
        sparse = [functools.partial(drop, density=recipe.density, rng=np.random.default_rng(seed)) for seed in seeds]
    merge = weighted_sum if recipe.method == "dare_linear" else disjoint_mean
    scale = 1.0 if recipe.scale is None else recipe.scale

    def combine(tensors):
        base, *others = tensors
        vectors = [thin(tensor - base) for thin, tensor in zip(sparse, others, strict=True)]
        merged = merge(vectors, recipe.weights)
        return np.where(merged == 0, base, base + scale * merged)  # -0.0 + 0.0 would lose the sign

    return combine


_PREPARE = {"linear": _prepare_linear, "slerp": _prepare_slerp}
_PREPARE |= dict.fromkeys(("ties", "dare_linear", "dare_ties"), _prepare_task_vectors)
