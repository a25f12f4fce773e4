"""The configuration: the keys of `keys.py`, checked once and before anything is loaded.

A config file (`configs/dpo.py`) has `get_config()` that returns an ml_collections ConfigDict. `load` finds and runs it,
`override` sets single keys from the command line, and `resolve` turns the result into frozen dataclasses.
Whatever is wrong raises a ConfigError whose one line begins with the key.
"""

import dataclasses
import importlib.machinery
import importlib.util
import json
import math
import pathlib
import re
from typing import Any

from jaxpost import schema
from jaxpost.errors import ConfigError
from jaxpost.keys import (
    DEFAULT_LOSS,
    FILTERS,
    KEYS_OF_PAIRS,
    STAGES_OF_PAIRS,
    STAGES_THAT_SAMPLE,
    STAGES_WITH_REFERENCE,
    STAGES_WITH_SCORES,
    Config,
    HostsConfig,
    KlConfig,
    LoraConfig,
    LossConfig,
    PpoConfig,
    QualityConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    ScoreConfig,
    TeacherConfig,
    ValueConfig,
)
from jaxpost.schema import Scalar, to_dict


def resolve(config) -> Config:
    """ConfigDict, dict or Config -> checked Config with every default filled in; `resolve(to_dict(c)) == c`.

    Raises:
      ConfigError: unknown key, wrong type, out of range, or keys that contradict each other.
    """
    resolved = _fill(schema.convert(Config, to_dict(config)))
    for name, text in _contradictions(resolved):
        raise ConfigError(f"{name}: {text}")
    return resolved


def to_json(config) -> str:
    """What is written to the run folder; `resolve(json.loads(to_json(c))) == c`."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def flatten(config) -> dict[str, Any]:
    """{"optimizer.learning_rate": 1e-4, ...}"""
    flat = {}
    for name, value in to_dict(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def differences(a, b) -> dict[str, tuple[Any, Any]]:
    """{key: (value in a, value in b)} of the keys whose values differ; None where a key is absent."""
    a, b = flatten(a), flatten(b)
    return {k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}


def find(name: str) -> pathlib.Path:
    """A path to a file, or the name of a config in ./configs or in the installed package.

    Such a name is `dpo`, `configs/dpo.py` or `plans/llama3_8b_dpo`.
    """
    path = pathlib.Path(name)
    if path.is_file():
        return path
    package = pathlib.Path(__file__).parent  # a wheel puts configs/ inside it, in a checkout they lie beside it
    folders = [pathlib.Path("configs"), *(p / "configs" for p in (package, package.parent) if (p / "configs").is_dir())]
    within = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    if str(within.parent) in (".", "plans"):
        for folder in folders:
            found = folder / within.parent / f"{path.name.removesuffix('.py')}.py"
            if found.is_file():
                return found
    known = sorted({p.stem for folder in folders for p in folder.glob("*.py")} - {"__init__"})
    raise ConfigError(f"--config: no file {name}, and no config of that name; there are {', '.join(known)}")


def load(name: str) -> dict:
    """Runs `get_config()` of the file that `find(name)` finds; the result as a nested dict, not yet checked."""
    path = find(name)
    module_name = f"jaxpost_config_{path.stem}"
    loader = importlib.machinery.SourceFileLoader(module_name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(module_name, loader))
    try:
        loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"--config: {error.filename}:{error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config: {path} defines no get_config()")
    return to_dict(module.get_config())


def override(values: dict, name: str, text: str) -> None:
    """Sets one dotted key of a nested dict from the text of a command line, read as the key's type."""
    field = schema.keys(Config).get(name)
    section, _, leaf = name.rpartition(".")
    if field is None and section not in schema.free_sections(Config):
        raise ConfigError(f"{name}: {schema.unknown(Config, name)}")
    inner = values
    for part in section.split(".") if section else ():
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{section}: expected a section of keys, got {inner!r}")
    inner[leaf] = schema.read(field.type if field else Scalar, text)


def needs_all_documents(c: Config) -> str | None:
    """The key and value that need all documents before the first step, if any."""
    if c.run.steps is None:
        return f"run.epochs={c.run.epochs}, whose steps are counted first"
    if c.stage in STAGES_WITH_REFERENCE and c.reference.mode == "cached":
        return "reference.mode='cached', which reads all first"
    if c.stage in STAGES_WITH_SCORES and c.batch.completions is None:
        return "batch.completions=None, the most that any example has"
    if c.stage == "kto":
        return "stage='kto', which pairs each prompt with another's answer"
    if c.teacher.outputs is not None:
        return "teacher.outputs, which are of all documents in their order"
    if any(isinstance(amount, dict) for _, amount in c.data.train):
        return "a budget of tokens in data.train"
    return None


def _fill(config: Config) -> Config:
    """The defaults that depend on other keys."""
    loss, data = config.loss, config.data
    if loss.name is None:
        loss = dataclasses.replace(loss, name=(DEFAULT_LOSS[config.stage],))
    if data.eval is None and {path for path, _ in data.train} == {"embedded"}:
        data = dataclasses.replace(data, eval=(("embedded", 1.0),))
    reference = config.reference
    if config.stage in STAGES_THAT_SAMPLE and reference.mode == "cached":
        reference = dataclasses.replace(reference, mode="live")  # of tokens that are only drawn in the step
    return dataclasses.replace(config, loss=loss, data=data, reference=reference)


def _contradictions(c: Config):
    """Yields (key, what is wrong) for keys that are fine alone but not together."""
    run, batch, mesh, optimizer = c.run, c.batch, c.mesh, c.optimizer
    if run.resume and run.dir is None:
        yield "run.dir", "missing; run.resume=True needs the folder of the run to go on with"
    if run.steps is None and run.epochs is None:
        yield "run.steps", "missing; set run.steps or run.epochs"
    if run.steps is not None and run.epochs is not None:
        yield "run.steps", f"{run.steps} contradicts run.epochs={run.epochs}; set one of them, the other to None"
    if run.steps is not None and optimizer.warmup_steps >= run.steps:
        yield "optimizer.warmup_steps", f"{optimizer.warmup_steps} does not fit in run.steps={run.steps}; set it lower"
    if run.steps is not None and run.profile is not None and sum(run.profile) > run.steps + 1:
        yield "run.profile", f"{run.profile} ends after run.steps={run.steps}"
    if batch.rows_per_step % batch.accumulate:
        yield "batch.accumulate", f"{batch.accumulate} does not divide batch.rows_per_step={batch.rows_per_step}"
    if c.data.max_tokens is not None and c.data.max_tokens > batch.tokens_per_row:
        yield "data.max_tokens", f"{c.data.max_tokens} is more than batch.tokens_per_row={batch.tokens_per_row}"
    yield from _quality_contradictions(c.data.quality)
    yield from _hosts_contradictions(c.hosts)
    if c.hosts.coordinator is not None and c.sampling.engine == "http":
        yield "sampling.engine", "'http', but of several hosts each would ask the server; leave hosts.coordinator None"
    sizes = dataclasses.asdict(mesh)
    for axis, size in sizes.items():
        if size == 0:
            yield f"mesh.{axis}", "0 is out of range; expected at least 1, or -1 for the rest"
    if list(sizes.values()).count(-1) > 1:
        rest = [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]
        yield rest[1], f"-1 (the rest) may stand for one axis only, and {rest[0]} has it"
    # -1 counts as 1 here: the mesh checks the rest
    over = ("slices", "data", "fsdp", "expert")
    shards = math.prod(max(getattr(mesh, axis), 1) for axis in over)
    if batch.rows_per_step // batch.accumulate % shards:
        rows = f"{batch.rows_per_step // batch.accumulate} rows of a microbatch"
        axes = " x ".join(f"mesh.{axis}" for axis in over)
        yield "batch.rows_per_step", f"{axes} = {shards} devices do not divide the {rows}"
    if batch.tokens_per_row % max(mesh.context, 1):
        yield "batch.tokens_per_row", f"{batch.tokens_per_row} tokens do not divide by mesh.context={mesh.context}"
    if run.eval_every and c.data.eval is None and not c.data.eval_examples:
        yield "run.eval_every", f"{run.eval_every}, but data.eval is None and data.eval_examples is 0"
    for name, value in (("export", False), ("eval_prompts", 0)):
        if c.model.adapter is not None and getattr(run, name):
            yield f"run.{name}", f"{getattr(run, name)}, but a model of model.adapter only trains; set {value}"
    yield from _score_contradictions(c)
    yield from _lora_contradictions(c)
    yield from _offload_contradictions(c)
    if c.stage not in STAGES_WITH_REFERENCE and c.reference != ReferenceConfig():
        changed = next(k for k in differences(c.reference, ReferenceConfig()))
        yield f"reference.{changed}", f"the stage {c.stage} has no reference model"
    yield from _loss_contradictions(c.stage, c.loss)
    if c.data.tokenize == "lazy" and (reason := needs_all_documents(c)):
        yield "data.tokenize", f"'lazy' contradicts {reason}; set 'auto' or 'ahead'"
    yield from _reference_contradictions(c.reference)
    yield from _teacher_contradictions(c)
    yield from _rollout_contradictions(c)


def _hosts_contradictions(hosts: HostsConfig):
    given = {name: getattr(hosts, name) for name in ("count", "index") if getattr(hosts, name) is not None}
    if hosts.coordinator is None:
        for name, value in given.items():
            yield (
                f"hosts.{name}",
                f"{value}, but hosts.coordinator is None: a run of one process; set it",
            )
    elif hosts.coordinator != "auto":
        _, colon, port = hosts.coordinator.rpartition(":")
        if not colon or not port.isdecimal():
            yield "hosts.coordinator", f"{hosts.coordinator!r} is neither host:port nor auto"
        for name in ("count", "index"):
            if name not in given:
                yield f"hosts.{name}", "missing; hosts.coordinator=host:port needs it"
    if len(given) == 2 and hosts.index >= hosts.count:
        yield "hosts.index", f"{hosts.index} is out of range; hosts.count={hosts.count}, and the first is 0"


def _reference_contradictions(reference: ReferenceConfig):
    if reference.mode != "cached" and reference.cache_dir is not None:
        yield "reference.cache_dir", f"reference.mode={reference.mode!r} keeps nothing on disk; set None"
    for name in ("alpha", "every"):
        if reference.mode != "moving" and getattr(reference, name) != getattr(ReferenceConfig, name):
            yield f"reference.{name}", f"only a reference that moves has one; reference.mode={reference.mode!r}"


def _loss_contradictions(stage: str, loss: LossConfig):
    if not loss.name:
        yield "loss.name", "expected a name, got an empty list"
    if len(set(loss.name)) < len(loss.name):
        yield "loss.name", f"{', '.join(loss.name)}: one of them stands twice; give it one weight"
    if loss.weights is not None and len(loss.weights) != len(loss.name):
        yield "loss.weights", f"{len(loss.weights)} for the {len(loss.name)} losses of loss.name; give one each"
    changed = [name for name in KEYS_OF_PAIRS if getattr(loss, name) != getattr(LossConfig(), name)]
    if stage not in STAGES_OF_PAIRS and (changed or len(loss.name) > 1):
        name = changed[0] if changed else "name"
        what = "takes one loss" if name in ("name", "weights") else "is not of pairs"
        yield f"loss.{name}", f"{getattr(loss, name)!r}, but the stage {stage} {what}"
    if loss.divergence_alpha != LossConfig().divergence_alpha and loss.divergence != "alpha_divergence":
        yield "loss.divergence_alpha", f"{loss.divergence_alpha}, but loss.divergence is {loss.divergence!r}"


def _teacher_contradictions(c: Config):
    if c.stage != "distill":
        if changed := differences(c.teacher, TeacherConfig()):
            yield f"teacher.{next(iter(changed))}", f"the stage {c.stage} has no teacher"
        return
    if c.teacher.path is None and c.teacher.outputs is None:
        yield "teacher.path", "missing; give a teacher, or teacher.outputs that `jaxpost teach` wrote"
    if c.model.adapter is not None:
        yield "model.adapter", "somebody else's model cannot be distilled; use a family that loads"


def _rollout_contradictions(c: Config):
    """The part of `_contradictions` about stages that sample."""
    sections = {"sampling": SamplingConfig, "rollout": RolloutConfig, "score": ScoreConfig, "kl": KlConfig}
    sections |= {"value": ValueConfig, "ppo": PpoConfig}
    if c.stage not in STAGES_THAT_SAMPLE:
        for section, kind in sections.items():
            if changed := differences(getattr(c, section), kind()):
                yield (
                    f"{section}.{next(iter(changed))}",
                    f"the stage {c.stage} learns from data, not from what it draws",
                )
        for name in ("halt_when", "warn_when"):
            if getattr(c, name):
                yield name, f"only stages that sample are watched, and {c.stage} does not"
        return
    if not c.score.reward:
        yield "score.reward", "missing; give a reward model, or a function pkg.mod:fn"
    elif c.score.weights is not None and len(c.score.weights) != len(c.score.reward):
        given = f"{len(c.score.weights)} for the {len(c.score.reward)} rewards of score.reward"
        yield "score.weights", f"{given}; give one each"
    if c.score.missing_eos_score is not None and c.score.missing_eos_penalty:
        yield "score.missing_eos_score", "stands in the score's place, and score.missing_eos_penalty is off it; set one"
    if c.run.steps is None:
        yield "run.steps", "missing; a stage that samples counts steps, not epochs"
    if c.model.adapter is not None:
        yield "model.adapter", "somebody else's model only trains; nothing can be drawn from it"
    if c.lora.dropout:
        yield "lora.dropout", f"{c.lora.dropout}, but what draws has none, and must be what learns; set 0"
    if c.batch.accumulate != 1:
        yield "batch.accumulate", f"{c.batch.accumulate}, but as many microbatches of batch.rows_per_step as needed are"
    if c.reference.mode == "moving":
        yield "reference.mode", "'moving' is of the stages that learn from pairs; set 'live'"
    s, row = c.sampling, c.rollout.max_prompt_tokens + c.sampling.max_new_tokens
    if s.min_new_tokens > s.max_new_tokens:
        yield "sampling.min_new_tokens", f"{s.min_new_tokens} is more than sampling.max_new_tokens={s.max_new_tokens}"
    if row > c.batch.tokens_per_row:
        both = f"rollout.max_prompt_tokens + sampling.max_new_tokens = {row}"
        yield "batch.tokens_per_row", f"{c.batch.tokens_per_row} is less than {both}"
    if s.engine == "local" and s.url is not None:
        yield "sampling.url", "only sampling.engine='http' asks a server; set it, or None"
    for name in ("url", "reload") if s.engine == "http" else ():
        if getattr(s, name) is None:
            yield f"sampling.{name}", "missing; sampling.engine='http' needs it (docs/servers.md)"
    for name in FILTERS if s.engine == "http" else ():
        if getattr(s, name) != getattr(SamplingConfig, name):
            why = "a server does not say how likely its draws were under filters, and each token is weighed by that"
            yield f"sampling.{name}", f"{getattr(s, name)}, but {why}; leave it out, or sampling.engine='local'"
    if c.value.model == "head" and c.value.path is not None:
        yield "value.path", "a head on the policy has no weights of its own to begin from; set None"
    for name in ("target", "gain"):
        if c.kl.controller == "fixed" and getattr(c.kl, name) != getattr(KlConfig, name):
            yield f"kl.{name}", "only kl.controller='adaptive' has one"


def _lora_contradictions(c: Config):
    lora = c.lora
    if lora.rank is None and lora.path is None:
        if lora.quantize != "none":
            yield "lora.quantize", f"{lora.quantize!r}, but quantised weights do not train; set lora.rank or lora.path"
        elif lora != LoraConfig():
            name = next(iter(differences(lora, LoraConfig())))
            yield f"lora.{name}", f"{getattr(lora, name)!r}, but there are no adapters; set lora.rank or lora.path"
        return
    if lora.path is not None:
        given = differences(lora, dataclasses.replace(LoraConfig(), path=lora.path))
        if name := next((name for name in given if name not in ("dropout", "any_base", "quantize")), None):
            yield f"lora.{name}", f"{getattr(lora, name)!r}, but the adapter of lora.path has its own; leave it out"
    if c.model.adapter is not None:
        yield "lora.rank", "a model of model.adapter takes no adapters of ours; set None"
    if c.precision.reference != "auto" and c.reference.path is None:
        yield "precision.reference", "with adapters the reference is the base beneath them; set 'auto'"


def _offload_contradictions(c: Config):
    if not c.offload.reference:
        return
    adapted = c.lora.rank is not None or c.lora.path is not None
    live = c.stage in STAGES_WITH_REFERENCE and c.reference.mode == "live"
    if not (adapted or live or (c.teacher.path is not None and c.teacher.outputs is None)):
        why = "the step reads no weights but those that train: no live reference, no teacher, no base of adapters"
        yield "offload.reference", f"True, but {why}; set False"
    if adapted and c.remat.policy == "none":
        why = "'none' keeps what it reads of the base for the backward pass, on the devices"
        yield "remat.policy", f"{why}, and offload.reference saves nothing; set 'full' or 'offload'"
    if c.model.adapter is not None:
        yield "offload.reference", "somebody else's model does not know when to read them; set False"


def _quality_contradictions(quality: QualityConfig):
    for name in ("drop_matching", "keep_matching"):
        for pattern in getattr(quality, name):
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"data.quality.{name}", f"{pattern!r} is not a regular expression ({error})"
    for name in ("prompt_characters", "prompt_words", "answer_characters", "answer_words"):
        limits = getattr(quality, name)
        if limits and limits[0] > limits[1]:
            yield f"data.quality.{name}", f"{limits}: the fewest is more than the most"


def _score_contradictions(c: Config):
    """The part of `_contradictions` about scalar heads."""
    if c.stage in STAGES_WITH_SCORES:
        if c.model.adapter is not None:
            yield "model.adapter", "somebody else's model has no scalar heads; train one of the families that load"
        return
    given = {"model.score_heads": c.model.score_heads, "batch.completions": c.batch.completions}
    for name, value in given.items():
        if value is not None:
            yield name, f"{value}, but the stage {c.stage} trains words; set None"
    if changed := differences(c.reward, RewardConfig()):
        yield f"reward.{next(iter(changed))}", f"the stage {c.stage} trains words"
