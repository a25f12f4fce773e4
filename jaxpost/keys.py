"""Every key a user may set, with type, default, range and meaning. These fields are the only list of keys."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jaxpost.schema import Scalar, Sources, free_keys, key

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
    kernels: Literal["auto", "xla", "pallas"] = key("of attention and experts; auto = pallas on TPU, else xla", "auto")
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
    # hh-rlhf loses 0.4 % to faults, 2 % to length where model and row are long enough; beyond half a setting is wrong.
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
        "the loss function's own keyword arguments, held against its signature; None = its default"
    )


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    path: str | None = key(
        "the reference model, named as model.path, or an adapter for it; None = the initial weights", None
    )
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
class SamplingConfig:
    """Of the stages that sample: by what and how completions are drawn."""

    engine: Literal["local", "http"] = key("in this process, or a server (vLLM, SGLang)", "local")
    temperature: float = key("divides the logits, in sampling and in training", 1.0, above=0)
    top_k: int | None = key("draw from the k likeliest tokens; None = all", None, low=1)
    top_p: float = key("draw from the likeliest tokens that sum to p", 1.0, above=0, high=1)
    min_p: float = key("draw from tokens at least p times as likely as the likeliest", 0.0, low=0, high=1)
    repetition_penalty: float = key("of tokens of prompt and completion; 1 = none", 1.0, above=0)
    max_new_tokens: int = key("most tokens of a completion", 128, low=1)
    min_new_tokens: int = key("tokens before a completion may end", 0, low=0)
    stop: tuple[str, ...] = key("strings that end a completion, besides the tokenizer's stop tokens", ())
    slots: int = key("local: completions that decode at once", 32, low=1)
    block_steps: int = key("local: most tokens drawn between two looks of the host", 32, low=1)
    prefill_rows: int = key("local: prompts read at once", 4, low=1)
    prefill_tokens: int = key("local: tokens of each read in one piece", 128, low=1)
    kv_cache: Literal["compute", "int8"] = key("local: keys and values in the type of products, or in int8", "compute")
    url: str | None = key("http: of the server, as http://localhost:8000", None)
    served_model: str | None = key("http: the model's name there; None = the first that it lists", None)
    api_key_env: str | None = key("http: environment variable that holds the server's key", None)
    reload: str | None = key("http: URL, command or pkg.mod:fn that has the server read an exported folder", None)
    concurrency: int = key("http: requests under way at once", 64, low=1)
    timeout_s: float = key("http: seconds to wait for a reply", 600.0, above=0)
    retries: int = key("http: of a request that fails", 5, low=0)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    prompts_per_step: int = key("prompts of one step", 32, low=1)
    completions_per_prompt: int = key("completions drawn for each", 4, low=1)
    max_prompt_tokens: int = key("longest prompt; data.on_long says what becomes of longer ones", 128, low=1)
    staleness: int = key("1: the next step's completions are drawn while this one's update runs", 0, low=0, high=1)
    importance_high: float = key("staleness, filters: largest weight of a token that another policy drew", 2.0, above=0)
    keep: int = key("newest steps whose completions stay in RUN_DIR/rollouts; what a resume needs stays too", 20, low=1)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Of the stages that sample: what a completion is worth."""

    reward: tuple[str, ...] | None = key(
        "reward model (run, folder or embedded:reward) or function pkg.mod:fn(question, answer, record), or several",
        None,
    )
    weights: tuple[float, ...] | None = key("in the sum of several rewards, one each; None = 1 each", None)
    combine: Literal["mean", "min"] = key("scores of a reward model's several heads as one", "mean")
    gold: str | None = key("as score.reward, never trained on: logged beside it", None)
    workers: int = key("processes in which functions run", 2, low=1)
    timeout_s: float = key("seconds that a function may take for a completion", 30.0, above=0)
    on_failure: Literal["skip", "stop"] = key(
        "a completion whose score fails counts for nothing, or ends the run", "skip"
    )
    normalize: bool = key("divide scores by their running standard deviation, less their mean", False)
    clip: float | None = key("largest score, either sign, after that; None = off", None, above=0)
    missing_eos_penalty: float = key("taken off a completion that did not end by itself", 0.0, low=0)
    missing_eos_score: float | None = key("the score of such a completion instead (EOS trick); None = its own", None)
    length_penalty: float = key("taken off for each token beyond score.free_tokens", 0.0, low=0)
    free_tokens: int = key("tokens without a score.length_penalty", 0, low=0)


@dataclasses.dataclass(frozen=True)
class KlConfig:
    """Of the stages that sample: the pull to the reference."""

    coef: float = key("of the KL from the reference, per nat", 0.05, low=0)
    where: Literal["reward", "loss"] = key("taken off each token's reward, or a term of the loss", "reward")
    estimator: Literal["k1", "k2", "k3"] = key("of the KL, from the tokens drawn (losses.kl)", "k1")
    controller: Literal["fixed", "adaptive"] = key("kl.coef stays, or moves until the KL is kl.target", "fixed")
    target: float = key("adaptive: nats of a completion", 6.0, above=0)
    gain: float = key("adaptive: share by which the coefficient may move, over 0.2, a step", 0.1, above=0)


@dataclasses.dataclass(frozen=True)
class ValueConfig:
    model: Literal["own", "head"] = key("a model of its own, or a scalar head on the policy's", "own")
    path: str | None = key(
        "own: what it begins from, named as model.path; None = the reward model, else the policy", None
    )
    coef: float = key("of its loss", 0.1, above=0)
    clip_range: float | None = key("a value may move so far in an update; None = any way", 0.2, above=0)
    learning_rate_scale: float = key("its learning rate over optimizer.learning_rate", 1.0, above=0)


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    epochs: int = key("passes over a step's completions", 4, low=1)
    minibatches: int = key("optimizer steps of a pass", 4, low=1)
    gamma: float = key("discount of a later reward, per token", 1.0, above=0, high=1)
    lam: float = key("lambda of generalised advantage estimation", 0.95, low=0, high=1)
    whiten_advantages: bool = key("to mean 0 and spread 1 over the step's tokens", True)
    whiten_rewards: bool = key("tokens' rewards to spread 1 about their mean", False)
    entropy_coef: float = key("of a bonus for entropy, per nat", 0.0, low=0)
    target_kl: float | None = key(
        "nats a token from the policy that drew, at which an update stops; None = off", None, above=0
    )


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
    slices: int = key("TPU slices, each with a copy of all; only gradients cross between them", 1, low=-1)
    data: int = key("devices along `data` (weights copied); -1 = the rest", 1, low=-1)
    fsdp: int = key("devices along `fsdp` (weights and optimizer state split); -1 = the rest", -1, low=-1)
    expert: int = key("devices along `expert` (rows and a mixture's experts split); -1 = the rest", 1, low=-1)
    context: int = key("devices along `context` (tokens of a row and weights split); -1 = the rest", 1, low=-1)
    tensor: int = key("devices along `tensor` (heads, mlp and vocabulary split); -1 = the rest", 1, low=-1)


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """A run of several processes, one a host (docs/hosts.md)."""

    coordinator: str | None = key(
        "host:port of process 0; auto = as jax finds it (TPU slice, SLURM, GKE, MPI); None = a run of one process", None
    )
    count: int | None = key("processes; None = as jax finds it", None, low=1)
    index: int | None = key("which of them this one is, from 0; None = as jax finds it", None, low=0)
    timeout_s: float = key("seconds within which all must have joined", 300.0, above=0)
    silence_s: float = key("seconds without a sign of life after which a host counts as dead", 100.0, low=5)
    step_timeout_s: float | None = key(
        "seconds in one phase of a step, the compilation of its first included, after which the watchdog speaks; "
        "None = off",
        None,
        above=0,
    )
    on_step_timeout: Literal["warn", "end"] = key("then only say where it hangs, or end the process as well", "warn")


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
    params: Literal["float32", "bfloat16"] = key("master weights", "float32")
    moments: Literal["float32", "bfloat16"] = key("of the optimizer; bfloat16 ones are rounded at random", "float32")
    compute: Literal["auto", "float32", "bfloat16"] = key("auto = bfloat16 on accelerators, float32 on CPU", "auto")
    reference: Literal["auto", "float32", "bfloat16"] = key("weights of reference, teacher; auto = as computed", "auto")


@dataclasses.dataclass(frozen=True)
class RematConfig:
    policy: Literal["none", "full", "offload", "dots", "dots_no_batch"] = key(
        "what the backward pass keeps of a layer; offload: as full, in the host's memory", "none"
    )


@dataclasses.dataclass(frozen=True)
class OffloadConfig:
    """What waits in the host's memory until the step reads it (docs/performance.md)."""

    moments: bool = key("of the optimizer; all come back at once for an update, so it saves little (measured)", False)
    reference: bool = key("weights that stay: reference, teacher, base of adapters; a layer at a time is read", False)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Of `jaxpost plan`: what only you know of the hardware."""

    price_per_chip_hour: float | None = key("of a chip, in any currency; None = no costs", None, above=0)
    network_gbytes_per_s: float | None = key(
        "GB/s of a chip to other slices or hosts; None = as published, if it is", None, above=0
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved configuration. Made by `resolve`, never by hand."""

    stage: Literal["sft", "dpo", "orpo", "simpo", "cpo", "kto", "reward", "distill", "ppo"] = key("the method")
    model: ModelConfig
    lora: LoraConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    loss: LossConfig
    reference: ReferenceConfig
    reward: RewardConfig
    teacher: TeacherConfig
    sampling: SamplingConfig
    rollout: RolloutConfig
    score: ScoreConfig
    kl: KlConfig
    value: ValueConfig
    ppo: PpoConfig
    optimizer: OptimizerConfig
    batch: BatchConfig
    mesh: MeshConfig
    hosts: HostsConfig
    run: RunConfig
    precision: PrecisionConfig
    remat: RematConfig
    offload: OffloadConfig
    plan: PlanConfig
    halt_when: tuple[str, ...] = key("rules over what is logged that end a run, as 'kl > 20' (train/watch.py)", ())
    warn_when: tuple[str, ...] = key("such rules that warn", ())


DEFAULT_LOSS = {
    **{"sft": "nll", "dpo": "sigmoid", "orpo": "orpo", "simpo": "simpo", "cpo": "cpo", "kto": "kto"},
    "reward": "bradley_terry",
    "distill": "forward_kl",
    "ppo": "ppo",
}
STAGES_WITH_REFERENCE = ("dpo", "kto", "ppo")
STAGES_THAT_SAMPLE = ("ppo",)  # and learn from what they drew
STAGES_WITH_SCORES = ("reward",)  # that train scalar heads, not words
STAGES_OF_PAIRS = ("dpo", "orpo", "simpo", "cpo")
KEYS_OF_PAIRS = ("weights", "divergence", "divergence_alpha", "ld_alpha", "wpo")  # of loss.*
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")  # of sampling.*: not all tokens as likely
