"""The loop of stages that learn from what they draw: draw, score, learn, watch, save.

With rollout.staleness = 1 a step's completions are drawn while the update of the step before is computed, by the
weights from before it: always one update old, so a run repeats whatever the timing.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import embedded
from jaxpost.config import to_dict
from jaxpost.errors import EngineError, ScoreError, UserError
from jaxpost.sampling.engine import sample
from jaxpost.sharding import place
from jaxpost.train import hosts, inputs, planned, watchdog
from jaxpost.train.checkpoint import Checkpointer, checksum
from jaxpost.train.evaluation import Evaluation
from jaxpost.train.folder import write_config
from jaxpost.train.frontier import write_frontier
from jaxpost.train.loop import first_evaluation, first_state, state_layout, stop_signal
from jaxpost.train.metrics import MetricsLog, open_writers
from jaxpost.train.online_programs import online_programs
from jaxpost.train.progress import Progress, print_table
from jaxpost.train.report import GIB, end_tables, state_bytes
from jaxpost.train.rollouts import Rollouts, mean, said, to_batch
from jaxpost.train.run import LoadedModel, Run
from jaxpost.train.scoring import Answer
from jaxpost.train.setup import with_shardings
from jaxpost.train.watch import Watch, last_good
from jaxpost.types import TrainState

log = logging.getLogger("jaxpost")
SIGNS = ("length", "repetition", "entropy", "no_eos", "spread", "duplicates")  # of reward hacking, in frontier.png
# What a step of any such stage logs besides its own metrics.
LOGGED = (*SIGNS, "gold", "score_failures", "loss", "tokens_per_second", "rollout_share", "num_tokens", "epoch")


@dataclasses.dataclass(frozen=True)
class Trained:
    """The parameters that an optimizer owns: as `Model` has them, of all models that train."""

    abstract: Any
    shardings: Any
    axes: Any
    load: Callable[[], Any]


def fit_online(
    config,
    folder,
    resume: bool,
    *,
    mesh,
    model,
    trained: Trained,
    rollouts: Rollouts,
    evaluator,
    learn,
    optimizer,
    begin,
    frozen,
    watch: Watch,
) -> Run:
    """Trains, and returns the Run; `halted` says where a rule of halt_when ended it.

    Args:
      model: the policy. trained: all that trains, {"policy": ..., ...}.
      learn: (microbatches of a minibatch) -> `(state, frozen, batch) -> (state, metrics)`, see `ppo.make_learn`.
      evaluator: (parameters that train -> all of the policy's) -> what evaluates a TrainState.
      begin: () -> the first carry. frozen: what `learn` reads besides the parameters. watch: the rules.
    """
    run, total = config.run, config.run.steps
    frozen = {**frozen, **model.load_frozen()}
    whole = lambda params: model.policy.whole(params["policy"], frozen)  # noqa: E731

    def init(params, carry):
        return TrainState(jnp.int32(0), params, optimizer.transform.init(params), jax.random.key(run.seed), carry)

    carry = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_everywhere(mesh)), begin())
    abstract, shardings = state_layout(init, trained, mesh, carry, config.offload.moments)
    if planned.current():
        state = with_shardings(abstract, shardings)
        planned.finish(*online_programs(config, mesh, model, trained, rollouts, learn, shardings, state, frozen))
    checkpoints = Checkpointer(folder / "checkpoints", run.keep_last, run.keep_best)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        stack.callback(rollouts.close)
        stack.enter_context(jax.set_mesh(mesh))
        fresh = jax.jit(init, donate_argnums=0, out_shardings=shardings)
        kept = with_shardings(abstract, shardings)
        state, extra = first_state(checkpoints, resume, folder, kept, lambda: fresh(trained.load(), begin()))
        start = int(state.step)
        described = inputs.describe(config, model, rollouts.prompts.dataset)
        inputs.record(folder, described | {"reward": rollouts.scorer.fingerprint})
        write_config(folder, config)
        metrics = MetricsLog(folder, open_writers(run.log_to, folder, to_dict(config)))
        stack.callback(metrics.close)
        metrics.cut(start or -1)
        hosts.wait()  # the first has cut it
        for row in metrics.read():
            watch.check(row)  # what they say was said before
        table(config, mesh, model, rollouts.prompts, abstract, start)
        evaluator = evaluator(whole)
        before = first_evaluation(folder, evaluator, state, metrics, start)
        parts = {"config": config, "folder": folder, "mesh": mesh, "rollouts": rollouts, "learn": learn}
        parts |= {"frozen": frozen, "watch": watch, "shardings": shardings, "evaluator": evaluator, "whole": whole}
        loop = OnlineLoop(**parts, checkpoints=checkpoints, metrics=metrics)
        state, finished = loop.run(state, start, total, extra)
        after = loop.evaluation or evaluator(state)
        end_tables(before, after)
        if hosts.first():
            write_frontier(
                folder,
                metrics.read(),
                kl="kl",
                reward="reward",
                gold="gold" if rollouts.gold else None,
                signs=SIGNS,
                alarms=loop.alarms,
            )
        result = Run(
            model=model,
            params=whole(state.params),
            mesh=mesh,
            folder=folder,
            state=state,
            rows=metrics.read(),
            finished=finished,
            evaluate=lambda: evaluator(state).metrics,
            halted=loop.halted,
        )
        if run.export and finished:
            result.export(folder / "export")
            log.info("exported to %s", folder / "export")
    return result


def _everywhere(mesh):
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@dataclasses.dataclass
class OnlineLoop:
    """Steps from `start` to `total`, with everything that happens between them. Fields as in `fit_online`."""

    config: Any
    folder: Any
    mesh: Any
    rollouts: Rollouts
    learn: Callable
    frozen: dict[str, Any]
    watch: Watch
    shardings: Any  # of the TrainState
    evaluator: Callable[[Any], Evaluation]
    checkpoints: Checkpointer
    metrics: MetricsLog
    whole: Callable[[Any], Any]  # parameters that train -> all of the policy's
    drawer: int = 0  # identity of the weights that drew the newest rollout
    evaluation: Evaluation | None = None  # the newest, and only while it is that of the present weights
    halted: str | None = None
    alarms: dict[int, str] = dataclasses.field(default_factory=dict)  # rules by step
    programs: dict[int, Callable] = dataclasses.field(default_factory=dict)  # by microbatches of a minibatch

    def run(self, state, start: int, total: int, extra: dict):
        """(state, finished). Stops after the present step, saved, when SIGTERM comes, and where a rule says so."""
        run, stale = self.config.run, self.config.rollout.staleness
        self.tokens, self.clock = extra["num_tokens"], time.perf_counter()
        rollout = self.replayed(start, extra) if stale else None
        with stop_signal() as stopped, Progress(total, start) as self.bar:
            for step in range(start + 1, total + 1):
                began = time.perf_counter()
                if rollout is None:
                    with self.kept_by_errors(state, step - 1):
                        rollout = self.draw(step, state.params)
                drawn = time.perf_counter() - began
                if stopped():  # the journal has what was drawn
                    self.keep(state, step - 1)
                    return self.stop(state, step - 1)
                batch, microbatches = to_batch(rollout, self.config.batch, **self.shape())
                before = {"policy": jax.tree.map(jnp.copy, state.params["policy"])} if stale and step < total else None
                watchdog.enter("update", step)
                state, found = self.program(microbatches)(state, self.frozen, place(batch, self.mesh))
                done, rollout = rollout, None
                if before is not None:  # while the device works on the update
                    rollout = self.draw(step + 1, before)
                self.evaluation = None
                alarms = self.write(step, found, done, drawn)
                halting = any(alarm.action == "halt" for alarm in alarms)
                stopping = stopped()
                if step == total or (run.eval_every and step % run.eval_every == 0) or halting:
                    with self.kept_by_errors(state, step):
                        self.evaluate(state, step)
                if halting:
                    return self.halt(state, alarms)
                if step == total or stopping or (run.checkpoint_every and step % run.checkpoint_every == 0):
                    self.save(state, step)
                self.clock = time.perf_counter()
                if stopping:
                    return self.stop(state, step, step == total)
        watchdog.enter("end")
        self.checkpoints.wait()
        return state, True

    def shape(self) -> dict[str, int]:
        c = self.config
        return {"branches": c.rollout.completions_per_prompt, "minibatches": c.ppo.minibatches}

    def program(self, microbatches: int):
        """What learns from a batch of so many rows; compiled once for each number that comes up."""
        if microbatches not in self.programs:
            learn = self.learn(microbatches)
            self.programs[microbatches] = jax.jit(learn, donate_argnums=0, out_shardings=(self.shardings, None))
        return self.programs[microbatches]

    def draw(self, step: int, params):
        """The rollout of a step by these parameters, known by the sum of their bits."""
        watchdog.enter("rollout", step)
        self.drawer = int(checksum(params["policy"]))
        return self.rollouts.draw(step, self.whole(params), self.drawer)

    def replayed(self, start: int, extra: dict):
        """The rollout that an asynchronous run had drawn ahead of the checkpoint it goes on from; None at a start."""
        if not start or start == self.config.run.steps:
            return None
        self.drawer = extra["drawer"]
        return self.rollouts.draw(start + 1, None, self.drawer)

    def write(self, step: int, found, rollout, drawn: float) -> list:
        """The row of one step; returns the alarms of the rules."""
        values = {name: float(m.value) for name, m in jax.device_get(found).items()}
        seconds, drawn = hosts.told(lambda: [time.perf_counter() - self.clock, drawn])  # rules may read them
        self.tokens += rollout.tokens
        bad, limit = values.pop("bad_in_a_row"), self.config.optimizer.max_bad_steps
        share = step * self.config.rollout.prompts_per_step / len(self.rollouts.prompts)
        timed = {"tokens_per_second": rollout.tokens / seconds, "rollout_share": drawn / seconds}
        row = {"step": step, **values, **rollout.signs, **timed, "num_tokens": self.tokens, "epoch": share}
        self.metrics.write(row)
        self.bar.update(step, values["reward"], rollout.tokens / seconds, name="reward")
        if bad >= limit:
            raise UserError(
                f"optimizer.max_bad_steps: {int(bad)} updates in a row up to step {step} had a non-finite gradient and "
                "were skipped; lower optimizer.learning_rate or look at the completions in rollouts/"
            )
        alarms = self.watch.check(row)
        for alarm in alarms:
            self.alarms[step] = alarm.rule
            log.warning("%s", alarm)
        return alarms

    def evaluate(self, state, step: int):
        watchdog.enter("evaluation", step)
        self.evaluation = self.evaluator(state)
        if self.evaluation.metrics:
            self.metrics.write({"step": step, **self.evaluation.rows()})

    def save(self, state, step: int):
        watchdog.enter("checkpoint", step)
        extra = {"num_tokens": self.tokens, "drawer": self.drawer}
        reward = self.evaluation.metrics.get("reward") if self.evaluation else None
        self.checkpoints.save(step, state, extra, to_dict(self.config), None if reward is None else -reward)
        kept = min(self.checkpoints.steps(), default=step)
        self.rollouts.journal.prune(min(kept, step - self.config.rollout.keep))

    def keep(self, state, step: int):
        if step not in self.checkpoints.steps():
            self.save(state, step)

    @contextlib.contextmanager
    def kept_by_errors(self, state, step: int):
        """A server that is gone, or scores that are missing, end the run in this block; what was learnt is saved."""
        try:
            yield
        except (EngineError, ScoreError):
            self.keep(state, step)
            log.warning("saved at step %d; go on with run.resume=True run.dir=%s", step, self.folder)
            raise

    def stop(self, state, step: int, finished: bool = False):
        self.checkpoints.wait()
        log.warning("SIGTERM: saved at step %d; go on with run.resume=True run.dir=%s", step, self.folder)
        return state, finished

    def halt(self, state, alarms):
        """Ends the run without saving what went wrong; names the last checkpoint from before."""
        self.checkpoints.wait()
        good = last_good(self.checkpoints.steps(), [alarm for alarm in alarms if alarm.action == "halt"])
        where = (
            "there is none from before" if good is None else f"the last from before is {self.folder}/checkpoints/{good}"
        )
        first = next(alarm for alarm in alarms if alarm.action == "halt")
        self.halted = f"{first}; no checkpoint of it was saved, {where}"
        log.warning("halted: %s", self.halted)
        return state, False


class RolloutEvaluator:
    """Completions of held-out prompts, drawn as in training by a key that stays the same, and their scores."""

    def __init__(self, config, rollouts: Rollouts, prompts, loaded: Callable[[Any], LoadedModel], whole):
        self.config, self.rollouts = config, rollouts
        self.prompts = [prompts[n] for n in range(min(config.data.eval_examples, len(prompts)))] if prompts else []
        self.loaded, self.whole = loaded, whole
        self.in_world = {path for path, _ in config.data.eval or ()} == {"embedded"}

    def __call__(self, state) -> Evaluation:
        params, rollouts, asked = self.whole(state.params), self.rollouts, self.prompts
        found, samples = {}, ()
        if asked:
            key = jax.random.fold_in(rollouts.key, 0)  # steps begin at 1
            tokens = [one.tokens for one in asked]
            drawn = [one for (one,) in sample(rollouts.engine, params, tokens, key, settings=rollouts.settings)]
            answers = [Answer(one, done, rollouts.text(done)) for one, done in zip(asked, drawn, strict=True)]
            found["reward"] = mean(rollouts.scorer(answers))
            if rollouts.gold is not None:
                found["gold"] = mean(rollouts.gold(answers))
            found["length"] = float(np.mean([len(done.tokens) for done in drawn]))
            shown = answers[: self.config.run.eval_prompts]
            samples = tuple((said(one.asked), one.text) for one in shown)
        if self.in_world and self.config.run.eval_prompts:
            ask = lambda questions: self.loaded(params).answer(  # noqa: E731
                [[{"role": "user", "content": question}] for question in questions], self.config.run.eval_new_tokens
            )
            found |= {f"world/{name}": value for name, value in embedded.evaluate(ask).items()}
        return Evaluation(found, samples)


def table(config, mesh, model, prompts, abstract, start: int) -> None:
    """What follows from the keys, at the start."""
    print_table("data", prompts.dataset.report.rows())
    parts = {name: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(t)) for name, t in abstract.params.items()}
    c = config.rollout
    rows = [
        *((f"parameters that train, {name}", count) for name, count in parts.items()),
        ("devices", " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1"),
        ("compute type", model.policy.compute_dtype),
        ("state (weights, moments)", f"{state_bytes(abstract) / GIB:.3f} GiB"),
        ("prompts", len(prompts)),
        ("completions a step", c.prompts_per_step * c.completions_per_prompt),
        ("updates a step", config.ppo.epochs * config.ppo.minibatches),
        ("steps", config.run.steps if not start else f"{start} done of {config.run.steps:,}"),
    ]
    print_table(f"{config.stage}: {config.model.path}", rows)
