"""Checkpoints of a run: orbax underneath, written in the background, restored onto any mesh.

A step directory holds parameters, optimizer state, step, key and carry, plus three JSON files: `extra` (place in the
data, counters, ...), `config` (the resolved configuration) and `manifest` (shape, type and checksum of each leaf).
Trees are stored flat, by path, so that NamedTuples and empty nodes need no special care and a leaf that is missing
is named.
"""

import contextlib
import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import LatestN, PreservationPolicy

from jaxpost.errors import CheckpointError
from jaxpost.sharding import on_device
from jaxpost.types import TrainState

PARTS = ("params", "opt_state", "step", "key", "carry")


class Checkpointer:
    """Saves and restores TrainStates under `directory`, one sub-directory a step.

    directory: local or gs:// folder, made if need be.
    keep_last: how many of the newest steps stay.
    keep_best: how many of the steps with the lowest evaluation loss stay as well.
    read_only: for looking into a run that may still be training: nothing is written, cleaned up or deleted.

    All hosts call every method. Use as a context manager, or call close().
    """

    def __init__(self, directory, keep_last: int = 2, keep_best: int = 1, read_only: bool = False):
        logging.getLogger("absl").addFilter(_without_orbax)
        self.directory = epath.Path(directory).absolute()
        self.restored: int | None = None  # the step that was read last
        self._retention = _LastAndBest(LatestN(keep_last), keep_best)
        options = ocp.CheckpointManagerOptions(
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            preservation_policy=self._retention,
            # Else orbax reads metadata of every step at the start, and a damaged one would end the run right there.
            lightweight_initialize=True,
        )
        with _one_line_errors(f"{self.directory}: cannot be opened as a checkpoint folder"):
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._retention.losses = {step: self._stored_loss(step) for step in self.steps()}

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self) -> list[int]:
        """Steps of which a directory exists, oldest first; a listed one may still turn out to be damaged."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest listed step, None without any."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The kept step with the lowest evaluation loss, None where none was evaluated."""
        return self._retention.best(self.steps())

    def save(self, step: int, state: TrainState, extra: dict, config: dict, eval_loss: float | None = None) -> None:
        """Starts saving `state`; returns when it has been copied off the device, so that it may be donated.

        A run that was restored from an earlier step, since newer ones were damaged, drops those here.
        Raises CheckpointError when this or the save before it failed (full disk, ...), or when the folder
        already holds this or a later step of a run that this one does not continue.
        """
        self.wait()
        self._drop_abandoned(step)
        loss = None if eval_loss is None or not math.isfinite(eval_loss) else float(eval_loss)
        self._retention.losses[step] = loss
        arrays = {part: _flat(getattr(state, part)) for part in PARTS}
        described = {part: {n: _described(x) for n, x in leaves.items()} for part, leaves in arrays.items()}
        checksums = {part: _checksums(leaves) for part, leaves in arrays.items()}
        items = {part: ocp.args.StandardSave(jax.tree.map(_raw, leaves)) for part, leaves in arrays.items() if leaves}
        items["manifest"] = ocp.args.JsonSave({"leaves": described, "checksums": checksums, "eval_loss": loss})
        items["extra"] = ocp.args.JsonSave(extra)
        items["config"] = ocp.args.JsonSave(config)
        with self._failed_save():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """The state and the `extra` of `step`, by default of the newest step that can be read.

        abstract: TrainState of ShapeDtypeStructs (or arrays); leaves with a sharding are restored onto it, so the
          mesh may differ from the one that saved.
        A damaged newest step is passed over with a warning that names it. Raises CheckpointError when nothing can
        be restored, or when the checkpoint holds other leaves, shapes or types than `abstract`.
        """
        wanted = {part: getattr(abstract, part) for part in PARTS}
        found = self._first_readable(lambda s: self._read(s, wanted), step)
        return TrainState(**{part: _unflat(found[part], tree) for part, tree in wanted.items()}), found["extra"]

    def restore_params(self, abstract_params, step: int | None = None, *, partly: bool = False):
        """The parameters alone, as `restore` would give them. partly: the checkpoint may hold more; it is not read."""
        wanted = {"params": abstract_params}
        found = self._first_readable(lambda s: self._read(s, wanted, partly), step)
        return _unflat(found["params"], abstract_params)

    def config(self, step: int | None = None) -> dict:
        """The resolved configuration that was saved with `step`, by default the newest readable one."""
        return self._first_readable(lambda s: self._read_json(s, "config"), step)

    def extra(self, step: int | None = None) -> dict:
        """The `extra` that was saved with `step`, by default that of the newest readable one."""
        return self._first_readable(lambda s: self._read_json(s, "extra"), step)

    def wait(self) -> None:
        """Blocks until what is being saved is on disk. CheckpointError if that failed."""
        with self._failed_save():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """wait(), then releases threads; the folder is not used any more, also when the last save failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # a failed save fails again here; wait() has told of it
                self._manager.close()

    def _first_readable(self, read: Callable[[int], Any], step: int | None):
        steps = self.steps() if step is None else [step]
        if not steps or (step is not None and step not in self.steps()):
            raise CheckpointError(f"{self.directory}: no checkpoint{'' if step is None else f' of step {step}'} there")
        reason = None
        for candidate in reversed(steps):
            try:
                found = read(candidate)
            except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # another run's checkpoint, or no memory: that is no damage
            except Exception as error:  # orbax, tensorstore and json raise whatever they like on damage
                reason = _first_line(error)
                if step is None:
                    warnings.warn(
                        f"{self.directory / str(candidate)} is damaged and passed over ({reason})", stacklevel=3
                    )
                continue
            self.restored = candidate
            return found
        raise CheckpointError(f"{self.directory}: step {steps[0]} is damaged ({reason}), and none is left that is not")

    def _read(self, step: int, wanted: dict[str, Any], partly: bool = False) -> dict[str, Any]:
        """{part: {path: array}} of the wanted {part: abstract tree}, and `extra`. partly: see `restore_params`."""
        manifest = self._read_json(step, "manifest")
        flat = {part: _flat(tree) for part, tree in wanted.items()}
        for part, leaves in flat.items():
            stored = {n: x for n, x in manifest["leaves"][part].items() if not partly or n in leaves}
            _check_same(f"{self.directory / str(step)}: {part}", stored, leaves)
        targets = {part: jax.tree.map(_target, leaves) for part, leaves in flat.items() if leaves}
        items = {part: _restore_args(leaves, partly) for part, leaves in targets.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore(), **items))
        arrays = {part: found[part] if part in items else {} for part in wanted}
        for part, leaves in arrays.items():
            for name, checksum in _checksums(leaves).items():
                if checksum != manifest["checksums"][part][name]:
                    raise OSError(f"the values of {part}/{name} are not those that were saved")
        return arrays | {"extra": found["extra"]}

    def _read_json(self, step: int, item: str) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def _stored_loss(self, step: int) -> float | None:
        try:
            return self._read_json(step, "manifest")["eval_loss"]
        except Exception:  # damaged: named when it is restored, and never the best
            return None

    def _drop_abandoned(self, step: int) -> None:
        later = [s for s in self.steps() if s >= step]
        if not later:
            return
        if self.restored is None or self.restored >= step:
            raise CheckpointError(
                f"{self.directory}: already holds step {max(later)}, so step {step} of this run cannot be saved; "
                "resume that run, or choose another run.dir"
            )
        for abandoned in later:
            self._manager.delete(abandoned)

    @contextlib.contextmanager
    def _failed_save(self):
        try:
            yield
        except Exception as error:
            self._manager.reload()  # orbax has already forgotten the steps that this one was to replace
            kept = self.latest()
            raise CheckpointError(
                f"{self.directory}: saving a checkpoint failed ({_first_line(error)}); "
                + (f"step {kept} is still there" if kept is not None else "there is no earlier one")
            ) from error


class _LastAndBest(PreservationPolicy):
    """Keeps the newest steps, and those of lowest evaluation loss. Losses are held here, not in orbax."""

    def __init__(self, last: LatestN, keep_best: int):
        self._last, self._keep_best = last, keep_best
        self.losses: dict[int, float | None] = {}

    def best(self, steps: list[int]) -> int | None:
        return next(iter(self._ranked(steps)), None)

    def should_preserve(self, checkpoints, *, context):
        best = self._ranked([c.step for c in checkpoints])[: self._keep_best]
        newest = self._last.should_preserve(checkpoints, context=context)
        return [keep or c.step in best for keep, c in zip(newest, checkpoints, strict=True)]

    def _ranked(self, steps: list[int]) -> list[int]:
        evaluated = [s for s in steps if self.losses.get(s) is not None]
        return sorted(evaluated, key=lambda s: (self.losses[s], s))


@contextlib.contextmanager
def _one_line_errors(what: str):
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{what} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    """What went wrong, in a few words: the system's reason where there is one, else the start of the message."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore
        return os.strerror(int(code[1]))
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text[:200] or type(error).__name__


def _without_orbax(record: logging.LogRecord) -> bool:
    """Log filter: orbax logs pages of tracebacks for an error that it then raises, and that we report."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _flat(tree) -> dict[str, Any]:
    """{path: leaf}, in the order of tree.leaves."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    # A tree that is one leaf has an empty path.
    return {jax.tree_util.keystr(p, simple=True, separator="/") or "value": x for p, x in paths}


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(x):
    return jax.random.key_data(x) if _is_key(x) else x


def _checksums(leaves: dict[str, Any]) -> dict[str, int]:
    """{path: sum of the leaf's bits as integers, modulo 2**32}, the same for any sharding.

    The arrays on disk have no checksums of their own: a flipped bit would come back as another weight.
    """
    return {name: int(x) for name, x in jax.device_get({n: _checksum(_raw(x)) for n, x in leaves.items()}).items()}


def checksum(tree) -> int:
    """Sum of the bits of all leaves as integers, modulo 2**32."""
    return sum(_checksums(_flat(tree)).values()) % 2**32


@jax.jit
def _checksum(x):
    x = on_device(x)
    if x.dtype != jnp.bool_:
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)


def _described(x) -> list:
    """[shape, type] for the manifest; a typed key's type, "key<fry>", names its generator."""
    return [list(x.shape), str(x.dtype)]


def _target(like) -> jax.ShapeDtypeStruct:
    """What orbax is to restore for an abstract leaf: the bits of a key, on the leaf's sharding."""
    raw = jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _restore_args(targets: dict[str, jax.ShapeDtypeStruct], partly: bool):
    if not partly:
        return ocp.args.StandardRestore(targets)
    each = {name: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype) for name, x in targets.items()}
    return ocp.args.PyTreeRestore(targets, restore_args=each, partial_restore=True)


def _unflat(leaves: dict[str, jax.Array], like):
    """The tree `like` with the restored leaves, keys typed again."""
    return jax.tree.unflatten(
        jax.tree.structure(like), [_typed(leaves[name], leaf) for name, leaf in _flat(like).items()]
    )


def _typed(x, like):
    if not _is_key(like):
        return x
    impl = jax.random.key_impl(jnp.empty((), like.dtype))  # an abstract leaf does not tell its generator
    return jax.random.wrap_key_data(x, impl=impl)


def _check_same(where: str, stored: dict[str, list], wanted: dict[str, Any]) -> None:
    """CheckpointError for the first leaf that differs in name, shape or type: orbax would cast without a word."""
    for name in [*wanted, *stored]:
        has = stored.get(name)
        needs = _described(wanted[name]) if name in wanted else None
        if has != needs:
            raise CheckpointError(f"{where}/{name} is {_spelled(has)} in the checkpoint, {_spelled(needs)} in this run")


def _spelled(described: list | None) -> str:
    return "absent" if described is None else f"{described[1]}{described[0]}"
