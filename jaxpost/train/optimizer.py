"""Optimizers from optax by name, the learning-rate schedule, masks by path, and the guard around them all.

Path patterns (`optimizer.freeze`, `optimizer.no_decay`) are regular expressions, searched anywhere in a
parameter's path ("layers/attention/q/kernel"): `embed` takes whatever has it in its path, `^layers/.*/kernel$`
is exact. A pattern that matches nothing is an error, since a mask that is silently empty trains the wrong model.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpost.errors import ConfigError

# Weight decay pulls matrices (embeddings included) to zero; scales and biases are left out, as in HF Trainer.
UNDECAYED = re.compile(r"norm|(^|/)(scale|bias|b)$")
# Logical axes that enumerate independent matrices of one stacked weight.
STACKING_AXES = frozenset({"layers", "experts", None})
# Neighbouring logical axes that together are one side of a matrix.
HEAD_AXES = frozenset({"heads", "kv_heads", "head_dim"})
MUON_BETA = 0.95  # momentum of the Muon paper; b1, b2 and eps belong to its AdamW part
MUON_RMS = 0.2  # Liu et al. 2025, section 2.2: brings Muon's updates to the size of AdamW's, so one rate fits both


class Optimizer(NamedTuple):
    """transform: an optax transformation whose state is a GuardState. schedule: update index (from 0) -> rate."""

    transform: optax.GradientTransformation
    schedule: Callable[[Any], jax.Array]


class GuardState(NamedTuple):
    """State of `skip_non_finite`. All but `inner` are scalars, and what the loop logs and stops by."""

    inner: Any
    applied: jax.Array  # int32, updates done; the next one has the learning rate schedule(applied)
    bad_in_a_row: jax.Array  # int32, skipped steps since the last good one
    bad_total: jax.Array  # int32
    grad_norm: jax.Array  # f32, global norm of the last step's gradients before clipping


def make_optimizer(settings, total_steps: int, params, axes=None, moment_dtype=jnp.float32) -> Optimizer:
    """The optimizer that `settings` (config.optimizer) describes.

    settings: name (adamw, adafactor, lion, muon), learning_rate, schedule (cosine, linear, constant),
      warmup_steps, final_fraction, b1, b2, eps, weight_decay (times the learning rate, for every optimizer),
      clip_norm (None: off), freeze and no_decay (path patterns; norms and biases are never decayed).
    total_steps: updates of the whole run.
    params: tree of arrays or ShapeDtypeStructs.
    axes: for muon, the same tree with each leaf's tuple of logical axis names (Policy.axes()).
    moment_dtype: type in which moments are kept. All arithmetic is f32.

    Frozen leaves get zero updates, have no moments and do not count in the gradient norm.
    Raises ConfigError for a pattern that matches nothing, or a warmup that does not fit.
    """
    names = leaf_names(params)
    frozen = matches(names, settings.freeze, "optimizer.freeze")
    undecayed = matches(names, settings.no_decay, "optimizer.no_decay")
    if len(frozen) == len(names):
        raise ConfigError(f"optimizer.freeze: {list(settings.freeze)} freezes every parameter; leave some to train")
    decayed = {name for name in names if name not in undecayed and not UNDECAYED.search(name)}
    schedule = make_schedule(settings, total_steps)

    def decay_mask(tree):
        return map_named(lambda name, _: name in decayed, tree)

    transforms = {"frozen": optax.set_to_zero()}
    matrices = {}
    if settings.name == "muon":
        matrices = {name: dims for name, dims in matrices_of(params, axes).items() if name not in frozen}
        transforms["matrix"] = _muon(settings, schedule, decay_mask, matrices)
        transforms["rest"] = _adamw(settings, schedule, decay_mask)
    else:
        transforms["rest"] = RULES[settings.name](settings, schedule, decay_mask)

    def label(name, _):
        return "frozen" if name in frozen else "matrix" if name in matrices else "rest"

    transform = in_float32(optax.partition(transforms, map_named(label, params)), moment_dtype)
    counted = map_named(lambda name, _: name not in frozen, params)
    return Optimizer(skip_non_finite(transform, settings.clip_norm, counted), schedule)


def make_schedule(settings, total_steps: int) -> Callable[[Any], jax.Array]:
    """Linear warmup, then cosine, linear or constant, down to final_fraction * learning_rate at `total_steps`.

    Of `warmup_steps` = w updates, update i (from 0) has the rate learning_rate * (i + 1) / (w + 1): none is
    spent at rate 0, and update w is the first at the full rate.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if warmup and warmup >= total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup} does not fit in the {total_steps} updates of this run; set it lower"
        )
    final, rest = settings.final_fraction, max(1, total_steps - warmup)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final),
        "linear": lambda: optax.linear_schedule(peak, peak * final, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[settings.schedule]()
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])

    def schedule(step):
        with jax.numpy_dtype_promotion("standard"):  # as in in_float32
            return jnp.asarray(after(step), jnp.float32)

    return schedule


def skip_non_finite(
    transform: optax.GradientTransformation, clip_norm: float | None = None, counted=None
) -> optax.GradientTransformation:
    """Clips by the global norm, and skips a step whose norm is not finite: zero updates, inner state untouched.

    The norm is taken once, in f32, over the leaves marked in `counted` (a tree of bools; None: all), and kept in
    the state for logging. Since the inner state stands still, so do the moments and the schedule's count.
    """

    def init(params):
        zero = jnp.zeros([], jnp.int32)
        return GuardState(transform.init(params), zero, zero, zero, jnp.zeros([], jnp.float32))

    def update(grads, state, params=None):
        norm = optax.tree.norm(_counted_leaves(grads, counted))
        good = jnp.isfinite(norm)
        if clip_norm is not None:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)
        updates, inner = transform.update(grads, state.inner, params)
        # A select, not lax.cond: it fuses with the update, so a skipped step costs no copy of the state.
        updates = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(good, new, old), inner, state.inner)
        bad = 1 - good.astype(jnp.int32)
        return updates, GuardState(
            inner=inner,
            applied=state.applied + 1 - bad,
            bad_in_a_row=(state.bad_in_a_row + 1) * bad,
            bad_total=state.bad_total + bad,
            grad_norm=norm,
        )

    return optax.GradientTransformation(init, update)


def in_float32(transform: optax.GradientTransformation, moment_dtype=jnp.float32) -> optax.GradientTransformation:
    """Runs `transform` on f32 copies of gradients and parameters, so that its state and arithmetic are f32.

    optax takes types from the parameters: with bf16 ones Adam's second moment would be bf16, where
    0.999 * nu rounds back to nu, whatever `mu_dtype` says. Moments (`mu`, `nu`) are kept in `moment_dtype`, where
    that is bf16 rounded up or down at random, so that on average nothing is lost; the draw is that of the count.
    The updates are f32: add them with `apply_updates`.
    """

    def stored(state):
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        named = [({getattr(k, "name", None) for k in path}, x) for path, x in leaves]
        count = next((x for names, x in named if "count" in names), jnp.int32(0))
        kept = []
        for n, (names, x) in enumerate(named):
            if names & {"mu", "nu"}:
                x = rounded(x, moment_dtype, count.astype(jnp.uint32) * jnp.uint32(len(named)) + jnp.uint32(n))
            kept.append(x)
        return jax.tree.unflatten(structure, kept)

    def init(params):
        return stored(transform.init(_to_float32(params)))

    def update(grads, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by its int32 counts
            updates, state = transform.update(_to_float32(grads), _to_float32(state), _to_float32(params))
        return updates, stored(state)

    return optax.GradientTransformation(init, update)


def rounded(x, dtype, draw):
    """x (f32) in `dtype`; in bf16 one of its two neighbours, so likely that the mean is x.

    draw: uint32[], tells draws apart. The bits are a hash of it and of the place (lowbias32 of Wellons, "Prospecting
    for hash functions", 2018): threefry takes the TPU compiler 20 s for a model's moments.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    noise = _hashed(place ^ _hashed(draw)) >> 16
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + noise
    up = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), up, x).astype(jnp.bfloat16)  # what is no number stays none


def _hashed(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def apply_updates(params, updates):
    """params + updates, added in f32 and rounded once to the parameter's type."""
    return jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)


def leaf_names(tree) -> list[str]:
    """Paths of the leaves, "layers/attention/q/kernel"."""
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(fn, tree):
    """tree with fn(path, leaf) for each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda p, x: fn(jax.tree_util.keystr(p, simple=True, separator="/"), x), tree
    )


def matches(names: Sequence[str], patterns: Sequence[str], key: str) -> set[str]:
    """The names in which any of the regular expressions is found. ConfigError naming `key` for one that has none."""
    found = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(f"{key}: {pattern!r} is not a regular expression ({error})") from None
        if not hits:
            raise ConfigError(f"{key}: {pattern!r} matches no parameter; there are {_some(names)}")
        found |= hits
    return found


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _to_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _counted_leaves(grads, counted) -> list[jax.Array]:
    if counted is None:
        counted = jax.tree.map(lambda _: True, grads)
    kept = jax.tree.map(lambda g, use: g.astype(jnp.float32) if use else None, grads, counted)
    return jax.tree.leaves(kept)


def _adamw(settings, schedule, mask) -> optax.GradientTransformation:
    """Loshchilov and Hutter 2019, with the decay times the learning rate as in PyTorch."""
    return optax.adamw(
        schedule, b1=settings.b1, b2=settings.b2, eps=settings.eps, weight_decay=settings.weight_decay, mask=mask
    )


def _lion(settings, schedule, mask) -> optax.GradientTransformation:
    """Chen et al. 2023. Its learning rate is 3 to 10 times smaller than AdamW's."""
    return optax.lion(schedule, b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay, mask=mask)


def _adafactor(settings, schedule, mask) -> optax.GradientTransformation:
    """Shazeer and Stern 2018, without momentum, with the absolute learning rate (no parameter scale).

    Not `optax.adafactor`, which decays by `weight_decay` itself, not by learning rate times it.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(settings.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(settings, schedule, mask, matrices: dict) -> optax.GradientTransformation:
    """Jordan 2024, scaled as by Liu et al. 2025 (arXiv 2502.16982)."""
    return optax.contrib.muon(
        schedule,
        beta=MUON_BETA,
        weight_decay=settings.weight_decay,
        weight_decay_mask=mask,
        consistent_rms=MUON_RMS,
        # Without these optax takes every weight that is not 2-D, so every stacked one, for Adam's.
        muon_weight_dimension_numbers=lambda tree: map_named(lambda name, _: matrices[name], tree),
    )


RULES = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor}


def matrices_of(params, axes) -> dict[str, optax.contrib.MuonDimensionNumbers]:
    """Which leaves are (stacks of) matrices, and along which axes. Embeddings and the head are not."""
    if axes is None:
        raise ValueError("muon needs the logical axes of the parameters to tell matrices from stacks of them")
    structure = jax.tree.structure(params)
    found = {}
    for name, leaf_axes in zip(leaf_names(params), structure.flatten_up_to(axes), strict=True):
        sides = _sides(tuple(leaf_axes))
        if len(sides) == 2 and "vocab" not in leaf_axes:
            found[name] = optax.contrib.MuonDimensionNumbers(*sides)
    return found


def _sides(axes: tuple) -> list[tuple[int, ...]]:
    """Axis indices grouped into sides of a matrix: ("layers", "embed", "heads", "head_dim") -> [(1,), (2, 3)]."""
    sides, last = [], None
    for i, axis in enumerate(axes):
        if axis in STACKING_AXES:
            last = None
        elif axis in HEAD_AXES and last in HEAD_AXES:
            sides[-1] = (*sides[-1], i)
            last = axis
        else:
            sides.append((i,))
            last = axis
    return sides
