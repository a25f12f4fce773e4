"""The configuration: every key a user may set, checked once and before anything is loaded.

A config file (`configs/dpo.py`) has `get_config()` that returns an ml_collections ConfigDict. `load` finds and runs it,
`override` sets single keys from the command line, and `resolve` turns the result into the frozen dataclasses below.
Whatever is wrong raises a ConfigError whose one line begins with the key. These fields are the only list of keys.
"""

import dataclasses
import importlib.machinery
import importlib.util
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

from jaxpost import schema
from jaxpost.errors import ConfigError
from jaxpost.schema import Scalar, Sources, free_keys, key, to_dict

# What data.allow may name: REFUSALS of jaxpost.data.preflight, less NEVER_ALLOWED.
Refusal = Literal[
    "two_bos",
    "no_end_trained",
    "end_does_not_stop",
    "empty_mask",
    "seen_trained",
    "header_trained",
    "completion_lost",
    "not_shown",
    "pad_inside",
    "chosen_equals_rejected",
    "prompt_not_prefix",
    "too_many_dropped",
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    path: str = key("folder in Hugging Face layout, hub name (extra `hf`), embedded:base or embedded:sft; may be gs://")
    adapter: str | None = key("dotted path to a function of model.path that returns a models.adapter.Adapter", None)
    balance_loss: float | None = key("weight of the experts' load-balancing loss; None = config.json's", None, low=0)
    score_heads: int | None = key("reward: scalar heads on one trunk; None = 1, or those of model.path", None, low=1)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int | None = key("of low-rank adapters, which then train in place of the weights; None = off", None, low=1)
    alpha: float = key("the adapters' product is scaled by alpha / rank", 16.0, above=0)
    targets: tuple[str, ...] = key(
        "regular expressions, searched in attn/{q,k,v,o} and mlp/{gate,up,down}", ("attn/", "mlp/")
    )
    rslora: bool = key("scale by alpha / sqrt(rank) instead", False)
    dora: bool = key("train each output's magnitude too (DoRA)", False)
    dropout: float = key("share of an adapter's inputs left out in training", 0.0, low=0, below=1)
    path: str | None = key("adapter to go on from, in the layout of PEFT; rank and the like are its own", None)
    any_base: bool = key("take adapters that were trained on other weights of the same shapes", False)
    quantize: Literal["none", "int8", "nf4"] = key("how the weights beneath are held (nf4: QLoRA)", "none")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = key("folder or file (.model, tokenizer.json); None = the model's", None)
    template: str | None = key("chat template: a path or `plain`; None = the tokenizer's own", None)


SCRIPTS = Literal[
    *("Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek", "Gujarati"),
    *("Gurmukhi", "Han", "Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana", "Khmer", "Lao", "Latin", "Malayalam"),
    *("Mongolian", "Myanmar", "Sinhala", "Tamil", "Telugu", "Thai", "Tibetan"),
]


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """Which training examples are left out; all off by default. Of a pair both answers must pass."""

    prompt_characters: tuple[int, int] | None = key("fewest and most characters of the prompt", None, low=0)
    prompt_words: tuple[int, int] | None = key("fewest and most words of the prompt", None, low=0)
    answer_characters: tuple[int, int] | None = key("fewest and most characters of each answer", None, low=0)
    answer_words: tuple[int, int] | None = key("fewest and most words of each answer", None, low=0)
    scripts: tuple[SCRIPTS, ...] = key("keep what is written in these", ())
    script_share: float = key("share of the letters that must belong to data.quality.scripts", 0.9, above=0, high=1)
    drop_refusals: bool = key("drop answers (of pairs: chosen ones) that begin with a refusal", False)
    refusal_phrases: tuple[str, ...] = key("phrases that count as refusals besides those known", ())
    drop_matching: tuple[str, ...] = key("regular expressions; dropped where one is found in any text", ())
    keep_matching: tuple[str, ...] = key("regular expressions; dropped unless one of them is found in a text", ())
    decontaminate: tuple[str, ...] = key("evaluation files, named as in data.train", ())
    decontaminate_ngram: int = key("words of a run that is compared", 8, low=1)
    decontaminate_share: float = key("share of an evaluation text's runs; 0 = any one run", 0.5, low=0, high=1)
    exact_duplicates: bool = key("drop all but the first of equal examples, case and spaces aside", False)
    near_duplicates: float | None = key(
        "drop what is this similar to a longer one (Jaccard; extra `quality`); None = off", None, above=0, high=1
    )
    near_ngram: int = key("words of the runs whose sets are compared", 5, low=1)
    near_permutations: int = key("of MinHash: the similarity is right to about 1/sqrt of it", 128, low=16)

    @property
    def on(self) -> bool:
        """Whether anything can be left out."""
        lengths = (self.prompt_characters, self.prompt_words, self.answer_characters, self.answer_words)
        one_by_one = (self.scripts, self.drop_refusals, self.drop_matching, self.keep_matching, self.decontaminate)
        return any((*lengths, *one_by_one, self.exact_duplicates, self.near_duplicates))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: Sources = key("`embedded`, a path, or a list of paths, [path, weight] or {'path': ..., 'tokens': a budget}")
    eval: Sources | None = key("as data.train; None = the held-out split of `embedded`, else see eval_examples", None)
    eval_examples: int = key("where data.eval is None: examples of data.train held out, drawn by run.seed", 200, low=0)
    format: str = key("name of the record format; auto = by the fields", "auto")
    max_tokens: int | None = key("longest prompt + completion in tokens; None = what model and row hold", None, low=2)
    on_bad: Literal["drop", "error"] = key("a faulty example is dropped and counted, or ends the run", "drop")
    on_long: Literal["drop", "truncate"] = key("what happens to an example longer than max_tokens", "drop")
    # Real files lose 0.4 % to faults (hh-rlhf), up to 2 % to length at fitting settings: beyond 5 % a setting is wrong.
    max_dropped: float = key("largest share of the examples that may be dropped", 0.5, low=0, high=1)
    allow: tuple[Refusal, ...] = key("refusals of the preflight that become warnings", ())
    tokenize: Literal["auto", "ahead", "lazy"] = key(
        "before the first step or as the run goes; auto = lazy beyond 100,000 uncached examples where run.steps is set",
        "auto",
    )
    workers: int | None = key("processes that tokenise; 0 = none besides, None = by cores and work", None, low=0)
    cache_dir: str | None = key(
        "tokenised data, indices of files, unpacked files; None = the user's cache folder, '' = off", None
    )
    quality: QualityConfig = QualityConfig()


@dataclasses.dataclass(frozen=True)
class LossConfig:
    name: tuple[str, ...] | None = key(
        "name in jaxpost.losses or dotted path `pkg.mod:fn`; of pairs also a list, summed; None = the stage's own",
        None,
    )
    weights: tuple[float, ...] | None = key("of the losses of loss.name, one each; None = 1 each", None, low=0)
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = key(
        "of pairs: from the reference, in DPO and those of its relatives where it is defined (f-DPO)", "reverse_kl"
    )
    divergence_alpha: float = key("alpha of loss.divergence='alpha_divergence'", 0.5, low=0)
    ld_alpha: float = key("of pairs: what tokens beyond the shorter answer count (LD-DPO); 1 = all", 1.0, low=0, high=1)
    wpo: bool = key("of pairs: weigh each by how likely the policy is to say it (WPO)", False)
    hyperparameters: Mapping[str, Scalar] = free_keys(
        "the loss function's own keyword arguments, held against its signature"
    )


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    path: str | None = key("the reference model, named as model.path; None = the initial weights", None)
    mode: Literal["cached", "live", "moving"] = key(
        "log-probabilities computed once and kept on disk, or each step; moving: each step, of weights that follow",
        "cached",
    )
    alpha: float = key("moving: reference = alpha * policy + (1 - alpha) * reference; 1 = a copy", 1.0, above=0, high=1)
    every: int = key("moving: updates between two such steps of the reference (tau of TR-DPO)", 512, low=1)
    cache_dir: str | None = key("folder of the cached log-probabilities; None = the user's cache folder", None)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    margin: float = key(
        "bradley_terry: margin for each point by which the data score the chosen one higher", 0.0, low=0
    )
    bootstrap: bool = key("several heads: each learns from its own half of the examples, weighted twice", True)
    init_std: float | None = key(
        "standard deviation of fresh heads in units of 1/sqrt(D + 1); None = 0 for one head, 1 for several", None, low=0
    )
    normalize_on: Sources | None = key("data whose scores get mean 0 and spread 1; None = what is evaluated on", None)


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Of the stage distill: whose distribution over the next token is learnt."""

    path: str | None = key("the teacher, named as model.path, with the same tokenizer; read in every step", None)
    outputs: str | None = key("folder that `jaxpost teach` wrote, in place of a loaded teacher", None)
    top_k: int | None = key("its k likeliest tokens, the rest as one; None = all, or those stored", None, low=1)
    temperature: float = key("divides the logits of both before they are compared", 1.0, above=0)
    nll_weight: float = key("weight of the data's own negative log-likelihood, added to the loss", 0.0, low=0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adafactor", "lion", "muon"] = key("muon: on matrices, adamw on the rest", "adamw")
    learning_rate: float = key("peak, per step", 1e-4, above=0)
    schedule: Literal["cosine", "linear", "constant"] = key("shape after the warmup", "cosine")
    warmup_steps: int = key("steps of linear rise to the peak, none of them at rate 0", 0, low=0)
    final_fraction: float = key("learning rate of the last step, as a share of the peak", 0.1, low=0, high=1)
    b1: float = key("decay of the first moment, per step", 0.9, low=0, below=1)
    b2: float = key("decay of the second moment, per step", 0.999, low=0, below=1)
    eps: float = key("added to the root of the second moment", 1e-8, above=0)
    weight_decay: float = key("decoupled; times the learning rate, per step", 0.0, low=0)
    clip_norm: float | None = key("largest global norm of the gradient; None = off", 1.0, above=0)
    freeze: tuple[str, ...] = key("regular expressions; a parameter whose path has a match stays as it is", ())
    no_decay: tuple[str, ...] = key("as optimizer.freeze: no weight decay; norms and biases have none anyway", ())
    max_bad_steps: int = key("consecutive steps with a non-finite gradient that end the run", 10, low=1)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    rows_per_step: int = key("rows of one optimizer step, over all devices and microbatches", 8, low=1)
    tokens_per_row: int = key("tokens of a packed row", 1024, low=2)
    accumulate: int = key("microbatches a step is cut into; divides rows_per_step", 1, low=1)
    documents_per_row: int = key("most documents (conversations, pairs) packed into a row", 32, low=1)
    completions: int | None = key("reward: most completions of a ranking; None = as the data have", None, low=2)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = key("devices along `data` (weights copied); -1 = the rest", 1, low=-1)
    fsdp: int = key("devices along `fsdp` (weights and optimizer state split); -1 = the rest", -1, low=-1)
    tensor: int = key("devices along `tensor` (heads and mlp split); -1 = the rest", 1, low=-1)
    expert: int = key("devices along `expert` (rows and a mixture's experts split); -1 = the rest", 1, low=-1)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    dir: str | None = key("run folder, may be gs://; None = a new runs/STAGE-N", None)
    steps: int | None = key("optimizer steps; this or run.epochs", None, low=1)
    epochs: int | None = key("passes over data.train; this or run.steps", None, low=1)
    seed: int = key("of the data order, the held-out draw and every random draw", 0, low=0, high=2**31 - 1)
    eval_every: int = key("steps between evaluations; 0 = only at the end", 0, low=0)
    eval_prompts: int = key(
        "held-out prompts completed (reward: whose completions are scored) before and after training; 0 = none",
        3,
        low=0,
    )
    eval_new_tokens: int = key("most tokens of such a completion", 64, low=1)
    checkpoint_every: int = key("steps between checkpoints; 0 = only at the end", 0, low=0)
    keep_last: int = key("newest checkpoints kept", 2, low=1)
    keep_best: int = key("checkpoints of lowest evaluation loss kept besides", 1, low=0)
    resume: bool = key("go on from the newest checkpoint of run.dir; afresh where there is none", False)
    profile: tuple[int, int] | None = key("(first step, steps) of a jax.profiler trace; None = off", None, low=1)
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = key("besides metrics.jsonl", ("tensorboard",))
    export: bool = key("write the final weights in Hugging Face layout to RUN_DIR/export", True)
    compilation_cache: str | None = key("folder of compiled programs; None = the user's cache folder, '' = off", None)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    params: Literal["float32", "bfloat16"] = key("master weights and optimizer moments", "float32")
    compute: Literal["auto", "float32", "bfloat16"] = key("auto = bfloat16 on accelerators, float32 on CPU", "auto")
    reference: Literal["auto", "float32", "bfloat16"] = key("weights of reference, teacher; auto = as computed", "auto")


@dataclasses.dataclass(frozen=True)
class RematConfig:
    policy: Literal["none", "full", "dots", "dots_no_batch"] = key("what the backward pass keeps of a layer", "none")


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved configuration. Made by `resolve`, never by hand."""

    stage: Literal["sft", "dpo", "orpo", "simpo", "cpo", "kto", "reward", "distill"] = key("the method")
    model: ModelConfig
    lora: LoraConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    loss: LossConfig
    reference: ReferenceConfig
    reward: RewardConfig
    teacher: TeacherConfig
    optimizer: OptimizerConfig
    batch: BatchConfig
    mesh: MeshConfig
    run: RunConfig
    precision: PrecisionConfig
    remat: RematConfig


DEFAULT_LOSS = {
    **{"sft": "nll", "dpo": "sigmoid", "orpo": "orpo", "simpo": "simpo", "cpo": "cpo", "kto": "kto"},
    "reward": "bradley_terry",
    "distill": "forward_kl",
}
STAGES_WITH_REFERENCE = ("dpo", "kto")
STAGES_WITH_SCORES = ("reward",)  # that train scalar heads, not words
STAGES_OF_PAIRS = ("dpo", "orpo", "simpo", "cpo")
KEYS_OF_PAIRS = ("weights", "divergence", "divergence_alpha", "ld_alpha", "wpo")  # of loss.*


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
    """A path to a file, or the name of a config (`dpo`, `configs/dpo.py`) in ./configs or in the installed package."""
    path = pathlib.Path(name)
    if path.is_file():
        return path
    package = pathlib.Path(__file__).parent  # a wheel puts configs/ inside it, in a checkout they lie beside it
    folders = [pathlib.Path("configs"), *(p / "configs" for p in (package, package.parent) if (p / "configs").is_dir())]
    if str(path.parent) in (".", "configs"):
        for folder in folders:
            found = folder / f"{path.name.removesuffix('.py')}.py"
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
    return dataclasses.replace(config, loss=loss, data=data)


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
    sizes = dataclasses.asdict(mesh)
    for axis, size in sizes.items():
        if size == 0:
            yield f"mesh.{axis}", "0 is out of range; expected at least 1, or -1 for the rest"
    if list(sizes.values()).count(-1) > 1:
        rest = [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]
        yield rest[1], f"-1 (the rest) may stand for one axis only, and {rest[0]} has it"
    shards = (
        max(mesh.data, 1) * max(mesh.fsdp, 1) * max(mesh.expert, 1)
    )  # -1 counts as 1 here: the mesh checks the rest
    if batch.rows_per_step // batch.accumulate % shards:
        rows = f"{batch.rows_per_step // batch.accumulate} rows of a microbatch"
        yield "batch.rows_per_step", f"mesh.data x mesh.fsdp x mesh.expert = {shards} devices do not divide the {rows}"
    if run.eval_every and c.data.eval is None and not c.data.eval_examples:
        yield "run.eval_every", f"{run.eval_every}, but data.eval is None and data.eval_examples is 0"
    for name, value in (("export", False), ("eval_prompts", 0)):
        if c.model.adapter is not None and getattr(run, name):
            yield f"run.{name}", f"{getattr(run, name)}, but a model of model.adapter only trains; set {value}"
    yield from _score_contradictions(c)
    yield from _lora_contradictions(c)
    if c.stage not in STAGES_WITH_REFERENCE and c.reference != ReferenceConfig():
        changed = next(k for k in differences(c.reference, ReferenceConfig()))
        yield f"reference.{changed}", f"the stage {c.stage} has no reference model"
    yield from _loss_contradictions(c.stage, c.loss)
    if c.data.tokenize == "lazy" and (reason := needs_all_documents(c)):
        yield "data.tokenize", f"'lazy' contradicts {reason}; set 'auto' or 'ahead'"
    yield from _reference_contradictions(c.reference)
    yield from _teacher_contradictions(c)


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
