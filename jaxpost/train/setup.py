"""What every offline stage opens before it trains: mesh, model, tokenizer, data. Each a step of a stage's list."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxpost import embedded
from jaxpost.config import needs_all_documents
from jaxpost.data import preflight
from jaxpost.data.dataset import Dataset, load_dataset
from jaxpost.data.loader import Loader
from jaxpost.data.mismatched import Mismatched
from jaxpost.data.quality import Removal
from jaxpost.data.templates import Template, load_template
from jaxpost.data.tokenizers import Tokenizer, load_tokenizer
from jaxpost.errors import ConfigError
from jaxpost.keys import STAGES_WITH_SCORES
from jaxpost.models import hf, lora, quantize
from jaxpost.models.adapter import Adapter
from jaxpost.models.config import ModelConfig
from jaxpost.models.policy import Policy
from jaxpost.schema import imported
from jaxpost.sharding import batch_shards, make_mesh, named_shardings, on_host, platform, with_dtype
from jaxpost.train import planned
from jaxpost.train.adapters import as_loaded, with_adapters
from jaxpost.train.folder import model_folder

log = logging.getLogger("jaxpost")

PREFLIGHT_SAMPLE = {"most_documents": 1000, "most_examples": 64}  # before every run; `jaxpost check` looks at all
BRANCHES = {"sft": 0, "preference": 2, "scored": 2, "unpaired": 1, "stepwise": 0}  # completions of a document, by kind


@dataclasses.dataclass(frozen=True)
class Model:
    """A policy with its tokenizer and where its weights lie, not yet loaded."""

    path: epath.Path
    name: str  # the path as it was given, or the hub name
    policy: Policy
    tokenizer: Tokenizer
    template: Template
    abstract: Any  # parameters that train as ShapeDtypeStructs, in the type they are held in
    shardings: Any
    fresh_scores: Callable[[], Any] | None = None  # makes the scalar heads that a language model's files do not hold
    loader: Callable[[], Any] | None = None  # of these parameters; None: from `path`
    base: "Model | None" = None  # what lies beneath adapters and stays
    adapter: epath.Path | None = None  # folder of the adapters
    quantized: str = "none"  # how the weights of a base are held (config.lora.quantize)

    @property
    def axes(self):
        """Logical axes of the parameters that train."""
        axes = self.policy.axes()
        return axes if self.base is None else lora.split(axes)[1]

    def load_frozen(self) -> dict[str, Any]:
        """What `Policy.whole` needs besides the parameters that train; the same arrays every time."""
        return {} if self.base is None else {"base": self.base.load()}

    @property
    def sharded(self):
        """The abstract parameters with their shardings, as a restore wants them."""
        return with_shardings(self.abstract, self.shardings)

    def load(self, keep=None):
        """The weights that train, each shard read by the device that holds it. keep: see `hf.load_params`."""
        if planned.current():
            modules = lora.modules_of(self.policy.config)
            plain = self.quantized == "none"
            return self.sharded if plain else quantize.abstract(self.quantized, modules, self.sharded)
        if self.loader is not None:
            return self.loader()
        if isinstance(self.policy, Adapter):
            return self.policy.load(self.shardings, jax.tree.leaves(self.abstract)[0].dtype)
        dtype = jax.tree.leaves(self.abstract)[0].dtype
        scores = self.fresh_scores and self.fresh_scores()
        return hf.load_params(self.path, self.policy, self.shardings, dtype, scores, keep=keep)


@dataclasses.dataclass(frozen=True)
class Data:
    """Documents to train on and to evaluate on, and what was dropped on the way."""

    train: Any  # sequence of Document, or LazyDocuments
    eval: Any  # sequence of Document, or None
    branches: int  # completions of a document, 0 where all are linear
    report: Any
    identity: dict[str, Any]  # what the documents' tokens depend on
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> sha256 of each data file
    removed: tuple[Removal, ...] = ()  # what data.quality left out

    def close(self) -> None:
        """Ends the processes that tokenise, if there are any."""
        if hasattr(self.train, "close"):
            self.train.close()


def with_shardings(abstract, shardings):
    """The abstract tree with each leaf's sharding."""
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, abstract, shardings)


def use_compilation_cache(folder: str | None) -> None:
    """jax's persistent compilation cache, in the user's cache folder by default; "" turns it off."""
    if folder == "":
        return
    jax.config.update("jax_compilation_cache_dir", folder or str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cache_folder() -> epath.Path:
    return epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxpost"


def open_mesh(config):
    """The mesh of the config over all devices, held against the batch. Raises ConfigError."""
    plan = planned.current()
    mesh = make_mesh(**dataclasses.asdict(config.mesh), **({"devices": plan.devices} if plan else {}))
    if plan:
        plan.mesh = mesh
    rows, shards = config.batch.rows_per_step // config.batch.accumulate, batch_shards(mesh)
    if rows % shards:
        raise ConfigError(
            f"batch.rows_per_step: a microbatch of {rows} rows cannot be split over the {shards} devices of "
            "mesh.slices x mesh.data x mesh.fsdp x mesh.expert; make it a multiple"
        )
    return mesh


def compute_dtype(name: str, mesh) -> str:
    """The type of products: "auto" is bfloat16 on accelerators and float32 on CPU."""
    if name != "auto":
        return name
    return "float32" if platform(mesh) == "cpu" else "bfloat16"


def open_model(config, mesh, *, path: str | None = None, any_head: bool = False) -> Model:
    """The model at `path`, described but not loaded. Raises CheckpointError, DataError.

    path: None is model.path, with the adapters of config.lora.

    mesh: None leaves `abstract` and `shardings` None, and asks for no device: enough to read data for it.
    any_head: not to be trained, so it may have words or scores for a head; else the stage decides.
    """
    name = embedded.resolve(path or config.model.path)
    folder = model_folder(name)
    if config.model.adapter is not None:
        policy = imported("model.adapter", config.model.adapter)(str(folder))
        _with_experts(config, policy.config)
    else:
        dtype = compute_dtype(config.precision.compute, mesh) if mesh is not None else "float32"
        found = _with_experts(config, hf.read_config(folder))
        place = {"kernels": None if config.model.kernels == "auto" else config.model.kernels}
        if mesh is not None:
            place["platform"] = platform(mesh)
        policy = Policy(found if any_head else _with_head(config, found), dtype, config.remat.policy, **place)
    if planned.current():
        tokenizer, template = planned.Words(policy.config.eos_ids), None
    else:
        tokenizer = load_tokenizer(embedded.resolve(config.tokenizer.path) if config.tokenizer.path else folder)
        template = load_template(config.tokenizer.template, tokenizer)
    abstract = shardings = fresh = None
    if mesh is not None:
        abstract = with_dtype(policy.abstract(), config.precision.params)
        shardings = named_shardings(policy.axes(), mesh, abstract)
    if config.model.adapter is None and policy.config.num_scores != found.num_scores:
        fresh = functools.partial(fresh_scores, policy.config, config.reward.init_std, config.run.seed)
    model = Model(folder, name, policy, tokenizer, template, abstract, shardings, fresh)
    return with_adapters(config, model, mesh) if path is None else model


def _with_head(config, model: ModelConfig) -> ModelConfig:
    """The model with the head that the stage trains: words, or scores. Raises ConfigError."""
    heads = config.model.score_heads
    if config.stage not in STAGES_WITH_SCORES:
        if model.num_scores:
            has = f"a model with {model.num_scores} scores for a head"
            raise ConfigError(f"model.path: {has}; {config.stage} trains words")
        return model
    if model.num_scores and heads not in (None, model.num_scores):
        raise ConfigError(
            f"model.score_heads: {heads}, but model.path has {model.num_scores}; set None to train them on"
        )
    return dataclasses.replace(model, num_scores=model.num_scores or heads or 1)


def fresh_scores(model: ModelConfig, std: float | None, seed: int) -> jax.Array:
    """f32[R, D]: normal with deviation std / sqrt(D + 1), each head from a key of its own.

    std: 1 is what Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031), detail 11,
      found in the first RLHF code: scores of about 1. None is 0 for one head: all scores are equal, and a first loss
      of ln 2 says that every score is read where it should be. It is 1 for several, which must differ where no
      example reaches. Larger ones, in models trained apart, are random priors: what was drawn is unlearnt where there
      is data and stays elsewhere (Osband et al. 2018, arXiv:1806.03335; docs/claims/ensemble.md).
    """
    std = float(model.num_scores > 1) if std is None else std
    key = jax.random.key(seed)
    heads = [jax.random.normal(jax.random.fold_in(key, r), (model.embed_dim,)) for r in range(model.num_scores)]
    return jnp.stack(heads) * (std / math.sqrt(model.embed_dim + 1))


def scored_model(model: Model, extra: dict) -> Model:
    """The model with the normalisation of its scores that a checkpoint's `extra` holds, if it does."""
    if not extra.get("score_norm"):
        return model
    config = dataclasses.replace(model.policy.config, score_norm=tuple(map(tuple, extra["score_norm"])))
    return dataclasses.replace(model, policy=dataclasses.replace(model.policy, config=config))


def _with_experts(config, model: ModelConfig) -> ModelConfig:
    """The model with the weight of its experts' loss. Raises ConfigError where it lacks the experts that keys name."""
    weight = config.model.balance_loss
    if model.experts is None and (weight is not None or config.mesh.expert != 1):
        name, value = ("mesh.expert", config.mesh.expert) if weight is None else ("model.balance_loss", weight)
        raise ConfigError(f"{name}: {value}, but a model of the family {model.family} has no experts")
    if weight is None:
        return model
    return dataclasses.replace(model, experts=dataclasses.replace(model.experts, loss_weight=weight))


def open_reference(config, model: Model, mesh) -> Model:
    """The reference: `reference.path`, or the initial weights of `model`, held in the type it computes in.

    Of a model with adapters: the base beneath them, with the adapters of lora.path; a path may be that of others.
    """
    path = config.reference.path or config.lora.path
    folder = None if path is None else model_folder(path)
    if folder is not None and hf.is_adapter(folder):
        return as_loaded(model, folder, mesh, any_base=config.lora.any_base)
    if model.base is not None and folder in (None, model.path):
        return model.base
    if config.reference.path is not None:
        other = open_model(config, mesh, path=config.reference.path)
        if other.policy.config.vocab_size != model.policy.config.vocab_size:
            raise ConfigError(
                f"reference.path: a vocabulary of {other.policy.config.vocab_size} tokens, but model.path has "
                f"{model.policy.config.vocab_size}; both must score the same tokens"
            )
    else:
        other = model
    return reference_weights(config, other)


def reference_weights(config, model: Model) -> Model:
    """The model, held in the type and the memory that precision.reference and offload.reference say: it never trains.

    Not in the host's where it moves: then it is part of the state.
    """
    dtype = model.policy.compute_dtype if config.precision.reference == "auto" else config.precision.reference
    shardings = model.shardings
    if config.offload.reference and config.reference.mode != "moving":
        shardings = on_host(shardings)
    return dataclasses.replace(model, abstract=with_dtype(model.abstract, dtype), shardings=shardings)


def open_data(config, model: Model, kind: str, inspect=None) -> Data:
    """Training and evaluation documents. Without data.eval, `data.eval_examples` of data.train are held out.

    inspect: called with each Dataset that is read; None refuses what a sample shows to be wrong (data/preflight).
    """
    if planned.current():
        documents, branches = planned.documents(kind, config.batch.completions)
        return Data(documents, None, branches, None, {})
    # The whole where something needs it before the first step: `inspect` looks at all documents.
    ahead = inspect is not None or (config.data.tokenize == "auto" and needs_all_documents(config))
    mode = "ahead" if ahead else config.data.tokenize
    paths = embedded.sources(config.data.train, config.stage, "train")
    train = _dataset(config, model, kind, paths, inspect, mode, config.data.quality)
    documents, held_out, files = train.documents, None, train.files
    identity = {"train": train.fingerprint, "tokenizer": model.tokenizer.fingerprint}
    if config.data.eval is not None:
        other = _dataset(
            config, model, kind, embedded.sources(config.data.eval, config.stage, "eval"), inspect, "ahead"
        )
        held_out, identity, files = other.documents, identity | {"eval": other.fingerprint}, files | other.files
    elif config.data.eval_examples:
        documents, held_out = documents.hold_out(config.data.eval_examples, config.run.seed)
        identity |= {"held_out": config.data.eval_examples, "seed": config.run.seed}
    branches = BRANCHES[kind] if kind in BRANCHES else _most_completions(config, documents, held_out)
    return Data(documents, held_out, branches, train.report, identity, files, train.removed)


def _most_completions(config, *parts) -> int:
    """batch.completions, or the most that any document has. Raises ConfigError where one has more than the key says."""
    most = max(getattr(part, "most_completions", 0) for part in parts)  # of lazy documents the step tells
    if config.batch.completions is not None and most > config.batch.completions:
        raise ConfigError(f"batch.completions: {config.batch.completions}, but an example has {most} completions")
    return config.batch.completions or most


def open_reference_set(config, model: Model):
    """The rankings of reward.normalize_on; None where the key is."""
    if config.reward.normalize_on is None or planned.current():
        return None
    paths = embedded.sources(config.reward.normalize_on, config.stage, "eval")
    return _dataset(config, model, "ranking", paths, None, "ahead").documents


def with_mismatched(config, model: Model, data: Data) -> Data:
    """Data of single completions, each document with an answer to another prompt as its second completion (KTO)."""
    if planned.current():
        paired, branches = planned.documents("preference", None)
        paired = [dataclasses.replace(paired[0], completion={"label": (1.0, 0.0)})]
        return dataclasses.replace(data, train=paired, branches=branches)
    fits = {"max_tokens": _max_tokens(config, model), "row_tokens": config.batch.tokens_per_row}
    limits = fits | {"seed": config.run.seed}
    parts = [part and Mismatched(part, **limits) for part in (data.train, data.eval)]
    for part in filter(None, parts):
        if part.cut or part.alone:
            log.info("mismatched answers: of %d, %d are cut to fit, %d left out", len(part), part.cut, part.alone)
    identity = data.identity | {"mismatched": limits}
    return dataclasses.replace(data, train=parts[0], eval=parts[1], branches=2, identity=identity)


def train_loader(config, data: Data, plan=None) -> Loader:
    """The order in which a run sees its training documents. plan: see `Loader`."""
    shape, run = _row_shape(config), config.run
    return Loader(data.train, **shape, branches=data.branches, seed=run.seed, epochs=run.epochs, plan=plan)


def one_pass(config, documents, branches: int) -> Loader:
    """Documents in their own order, once, a microbatch a step: for evaluation, and to score them."""
    shape = _row_shape(config) | {"rows_per_step": config.batch.rows_per_step // config.batch.accumulate}
    return Loader(documents, **shape, branches=branches, seed=0, shuffle=False, epochs=1)


def _row_shape(config) -> dict[str, int]:
    return {name: getattr(config.batch, name) for name in ("rows_per_step", "tokens_per_row", "documents_per_row")}


def _max_tokens(config, model: Model) -> int:
    return config.data.max_tokens or model.policy.config.max_positions


def open_prompts(config, model: Model, split: str, longest: int) -> Dataset:
    """What data.train or data.eval (split "train", "eval") ask. longest: tokens of a prompt, see data.on_long."""
    sources = embedded.sources(getattr(config.data, split), config.stage, split)
    quality = config.data.quality if split == "train" else None
    limits = {"max_tokens": longest, "row_tokens": None}
    return _dataset(config, model, "prompt", sources, None, "ahead", quality, **limits)


def _dataset(config, model: Model, kind: str, sources, inspect, mode: str, quality=None, **limits) -> Dataset:
    """Reads the sources. inspect: what looks at the result; see `open_data`. mode: as data.tokenize."""
    kept = config.data.cache_dir
    limits = {"max_tokens": _max_tokens(config, model), "row_tokens": config.batch.tokens_per_row} | limits
    dataset = load_dataset(
        sources,
        tokenizer=model.tokenizer,
        template=model.template,
        kind=kind,
        on_bad=config.data.on_bad,
        on_long=config.data.on_long,
        format=config.data.format,
        tokenize=mode,
        workers=config.data.workers,
        cache_dir=cache_folder() / "data" if kept is None else kept or None,
        settings=quality,
        **limits,
    )
    if inspect is not None:
        inspect(dataset)
    else:
        findings = preflight_findings(config, model, dataset, **PREFLIGHT_SAMPLE)
        for warning in preflight.refuse(findings, config.data.allow):
            allowed = warning.reason in config.data.allow
            log.warning("%s%s", "data.allow: " if allowed else "", warning)
    return dataset


def preflight_findings(config, model: Model, dataset: Dataset, **sample: int) -> list[preflight.Finding]:
    """What would silently ruin a run (data/preflight). sample: how many documents and examples; none = all."""
    return preflight.check(
        dataset,
        tokenizer=model.tokenizer,
        template=model.template,
        vocab_size=model.policy.config.vocab_size,
        max_dropped=config.data.max_dropped,
        on_long=config.data.on_long,
        **sample,
    )
