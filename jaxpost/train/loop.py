"""The loop that every offline stage shares: evaluate, train, checkpoint, evaluate again."""

import contextlib
import dataclasses
import json
import logging
import signal
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpost.config import to_dict
from jaxpost.data import quality
from jaxpost.data.loader import Loader
from jaxpost.errors import UserError
from jaxpost.sharding import host_rows, on_host, place, shardings_like
from jaxpost.train import hosts, inputs, planned, watchdog
from jaxpost.train.adapters import on_whole
from jaxpost.train.checkpoint import Checkpointer
from jaxpost.train.evaluation import Evaluation, Evaluator
from jaxpost.train.folder import write_atomically, write_config
from jaxpost.train.metrics import MetricsLog, open_writers
from jaxpost.train.optimizer import make_optimizer
from jaxpost.train.progress import Progress
from jaxpost.train.report import data_table, end_tables, short_names, start_table
from jaxpost.train.run import Run
from jaxpost.train.setup import scored_model, train_loader, with_shardings
from jaxpost.train.step import Carry, make_train_step
from jaxpost.types import TrainState

log = logging.getLogger("jaxpost")


def fit(config, folder, resume: bool, *, mesh, model, data, objective, frozen=None, carry=None, evaluator=None) -> Run:
    """Trains `model`, which is loaded here unless the run is resumed, on `data` and returns the Run.

    Args:
      config: resolved. folder: the run folder, and whether to go on from its newest checkpoint (`resume`).
      objective: see train/step.py. frozen: what it reads besides the parameters. carry: the `Carry` it remembers.
      evaluator: None: an Evaluator of the objective.

    Raises:
      UserError: `optimizer.max_bad_steps` consecutive steps with a non-finite gradient, or an unusable checkpoint.
    """
    run, batch = config.run, config.batch
    loader = train_loader(config, data)
    total = run.steps or loader.total_steps(run.epochs)
    optimizer = make_optimizer(config.optimizer, total, model.abstract, model.axes, config.precision.moments)
    evaluator = evaluator or Evaluator(config, mesh, model, data, objective, frozen)
    frozen, objective = evaluator.frozen, on_whole(model.policy, objective)
    carry = carry or Carry(None, lambda: None, None)

    def init(params, carry):
        return TrainState(jnp.int32(0), params, optimizer.transform.init(params), jax.random.key(run.seed), carry)

    abstract, shardings = state_layout(init, model, mesh, carry.abstract, config.offload.moments)
    observe = observer(optimizer.schedule)
    step_fn = jax.jit(
        make_train_step(objective, optimizer.transform, batch.accumulate, observe=observe, advance=carry.advance),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    if planned.current():
        planned.finish(train_program(config, mesh, model, data, step_fn, with_shardings(abstract, shardings), frozen))
    checkpoints = Checkpointer(folder / "checkpoints", run.keep_last, run.keep_best)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        stack.callback(data.close)
        stack.enter_context(jax.set_mesh(mesh))
        fresh = jax.jit(init, donate_argnums=(0, 1), out_shardings=shardings)
        kept = with_shardings(abstract, shardings)
        state, extra = first_state(checkpoints, resume, folder, kept, lambda: fresh(model.load(), carry.load()))
        if "plan" in extra:
            loader = train_loader(config, data, extra["plan"])
        start = int(state.step)
        inputs.record(folder, inputs.describe(config, model, data))
        write_config(folder, config)
        if config.data.quality.on and hosts.first():
            quality.write(data.removed, folder / quality.NAME)
        metrics = MetricsLog(folder, open_writers(run.log_to, folder, to_dict(config)))
        stack.callback(metrics.close)
        metrics.cut(start or -1)  # afresh: the evaluation before training is made again
        start_table(config, folder, mesh, model, data, abstract, loader, total, start)
        before = first_evaluation(folder, evaluator, state, metrics, start)
        loop = Loop(config, folder, loader, step_fn, evaluator, checkpoints, metrics, frozen, mesh)
        state, finished = loop.run(state, start, total, extra)
        after = loop.evaluation or evaluator(state)
        end_tables(before, after)
        data_table(data, loop)
        result = Run(
            model=scored_model(model, loop.extra),
            params=evaluator.whole(state.params),
            mesh=mesh,
            folder=folder,
            state=state,
            rows=metrics.read(),
            finished=finished,
            evaluate=lambda: evaluator(state).metrics,
        )
        if run.export and finished:
            result.export(folder / "export")
            log.info("exported to %s", folder / "export")
    return result


def train_program(config, mesh, model, data, step_fn, state, frozen) -> planned.Program:
    """The train step of a planned run."""
    batch, accumulate = planned.batch_of(config, mesh, data.train, data.branches), config.batch.accumulate
    rows, tokens = batch.rows.tokens.shape
    return planned.Program(
        "train step",
        step_fn,
        (state, frozen, batch),
        ledger={**planned.of_state(state), **frozen, "batch": batch},
        calls=1,
        policy=model.policy,
        rows=(rows // accumulate, tokens),
        # another model's forward pass, of one that is read in every step
        passes=accumulate * (3 + sum(name in frozen for name in ("reference", "teacher"))),
        trained=state.params,
        microbatches=accumulate,
    )


def first_state(checkpoints: Checkpointer, resume: bool, folder, abstract, fresh):
    """(the state that a run begins with, what is kept beside it): of the newest checkpoint, else what `fresh` makes."""
    if resume and checkpoints.latest() is not None:
        return checkpoints.restore(abstract)
    if resume:
        log.warning("run.resume: no checkpoint in %s yet; starting afresh", folder)
    return fresh(), {"num_tokens": 0}


def state_layout(init, model, mesh, carry, offload_moments: bool = False):
    """(abstract TrainState, its shardings): parameters and moments where the rules say, the carry where it says.

    offload_moments: they lie in the host's memory. The optimizer's scalars stay: the loop logs them.
    """
    abstract = jax.eval_shape(init, model.abstract, carry)
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: everywhere, abstract)
    moments = shardings_like(model.shardings, abstract.opt_state, mesh, model.abstract)
    if offload_moments:
        moments = jax.tree.map(lambda place, leaf: on_host(place) if leaf.ndim else place, moments, abstract.opt_state)
    carried = jax.tree.map(lambda leaf: leaf.sharding, carry)
    return abstract, dataclasses.replace(shardings, params=model.shardings, opt_state=moments, carry=carried)


def observer(schedule):
    """What a step logs of the optimizer, from its state before and after."""

    def observe(before, after):
        return {
            "grad_norm": after.grad_norm,
            "learning_rate": schedule(before.applied),
            "skipped_steps": after.bad_total,
            "bad_in_a_row": after.bad_in_a_row,
        }

    return observe


def first_evaluation(folder, evaluator, state, metrics, start: int) -> Evaluation:
    """The evaluation before training; a resumed run reads what it was then."""
    path = folder / "before.json"
    if start and path.exists():
        saved = json.loads(path.read_text())
        return Evaluation(saved["metrics"], tuple(map(tuple, saved["samples"])))
    found = evaluator(state)
    write_atomically(path, json.dumps(dataclasses.asdict(found)))
    if found.metrics:
        metrics.write({"step": start, **found.rows()})
    return found


class Loop:
    """Steps from `start` to `total`, with everything that happens between them."""

    def __init__(self, config, folder, loader: Loader, step_fn, evaluator, checkpoints, metrics, frozen, mesh):
        self.config, self.folder, self.loader, self.step_fn = config, folder, loader, step_fn
        self.evaluator, self.checkpoints, self.metrics = evaluator, checkpoints, metrics
        self.frozen, self.mesh = frozen, mesh
        self.evaluation = None  # the newest, and only while it is that of the present weights
        self.epochs = {}  # passes over each source, by the names of their metrics
        self.waited = 0.0  # seconds for data, since the clock was set
        self.timed = []  # (seconds, of which waited for data) of every row

    def run(self, state, start: int, total: int, extra: dict):
        """(state, finished). Stops after the present step, saved, when SIGTERM comes."""
        run, self.tokens, self.clock, pending = self.config.run, extra["num_tokens"], time.perf_counter(), None
        self.extra = extra
        rows = host_rows(self.mesh, self.loader.rows_per_step)
        with (
            stop_signal() as stopped,
            self.loader.iterate(start, rows) as batches,
            Progress(total, start) as self.bar,
        ):
            for step in range(start + 1, total + 1):
                if run.profile and step == run.profile[0]:
                    jax.profiler.start_trace(str(self.folder / "profile"))
                watchdog.enter("data", step)
                asked = time.perf_counter()
                batch = next(batches)
                self.waited += time.perf_counter() - asked
                tokens = self.loader.tokens(step - 1)
                watchdog.enter("update", step)
                batch = place(batch, self.mesh, rows, self.loader.rows_per_step)
                state, found = self.step_fn(state, self.frozen, batch)
                if run.profile and step == sum(run.profile) - 1:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                self.evaluation = None
                if pending:  # written while the device works on the next step
                    self.write(*pending)
                pending = (step, found, tokens)
                stopping = stopped()
                evaluate = step == total or (run.eval_every and step % run.eval_every == 0)
                save = step == total or stopping or (run.checkpoint_every and step % run.checkpoint_every == 0)
                if evaluate or save:
                    self.write(*pending)  # a checkpoint must find the rows of its own step on disk
                    pending = None
                if evaluate:
                    self.evaluate(state, step)
                if save:
                    self.save(state, step)
                if evaluate or save:
                    self.clock, self.waited = time.perf_counter(), 0.0  # they are no part of the next step
                if stopping:
                    self.checkpoints.wait()
                    log.warning("SIGTERM: saved at step %d; go on with run.resume=True run.dir=%s", step, self.folder)
                    return state, step == total
        watchdog.enter("end")
        self.checkpoints.wait()
        return state, True

    def write(self, step: int, found, tokens: int):
        """The row of one step; stops a run whose gradients stay non-finite."""
        values = {name: float(mean.value) for name, mean in jax.device_get(found).items()}
        now = time.perf_counter()  # results come in order: from the one before to this one is the time of this step
        seconds, self.clock = now - self.clock, now
        self.timed.append((seconds, self.waited))
        self.waited = 0.0
        self.tokens += tokens
        self.epochs = epoch_metrics(self.loader.epochs_done(step - 1))
        bad, limit = values.pop("bad_in_a_row"), self.config.optimizer.max_bad_steps
        terms = {name: values.pop(name) for name in list(values) if name.startswith("loss/")}
        if len(terms) > 1:  # of a single term it would only repeat the loss
            values |= terms
        timed = {"tokens_per_second": tokens / seconds, "data_wait_share": self.wait_share(-1)}
        row = {"step": step, **values, **timed, "num_tokens": self.tokens, **self.epochs}
        self.metrics.write(row)
        self.bar.update(step, values["loss"], tokens / seconds)
        if bad >= limit:
            raise UserError(
                f"optimizer.max_bad_steps: {int(bad)} steps in a row up to step {step} had a non-finite gradient and "
                "were skipped; lower optimizer.learning_rate or look at the examples of these steps"
            )

    def wait_share(self, first: int) -> float:
        """Share of the time of the rows from `first` on in which the host waited for data; 0 of none."""
        seconds, waited = map(sum, zip(*self.timed[first:], strict=True)) if self.timed[first:] else (1.0, 0.0)
        return waited / seconds

    def evaluate(self, state, step: int):
        watchdog.enter("evaluation", step)
        self.evaluation = self.evaluator(state)
        if self.evaluation.metrics:
            self.metrics.write({"step": step, **self.evaluation.rows()})

    def save(self, state, step: int):
        watchdog.enter("checkpoint", step)
        where = {"place": self.loader.place(step - 1)._asdict(), "plan": self.loader.plan()}
        self.extra = {"num_tokens": self.tokens, **where, **self.evaluator.extra(state.params)}
        loss = self.evaluation.metrics.get("loss") if self.evaluation else None
        self.checkpoints.save(step, state, self.extra, to_dict(self.config), loss)


def epoch_metrics(done: dict[str, float]) -> dict[str, float]:
    """`epoch`, and where there are several sources `data/epoch/NAME` of each: its file's name, or path if ambiguous."""
    names = short_names([path for path in done if path])
    found = {f"data/epoch/{name}": done[path] for path, name in names.items()}
    return {"epoch": done[""], **(found if len(names) > 1 else {})}


@contextlib.contextmanager
def stop_signal():
    """() -> whether SIGTERM has come (what preemption sends), of several hosts to any; asked once a step.

    The former handler comes back afterwards.
    """
    event = threading.Event()
    if hosts.count() > 1:
        yield hosts.Stop()  # by the handler that jax has set
        return
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield event.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
