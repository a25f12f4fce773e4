"""What a run leaves in the hands of its user: weights, metrics, and a model to talk to."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxpost import config as configs
from jaxpost.errors import ConfigError
from jaxpost.keys import STAGES_THAT_SAMPLE
from jaxpost.models import hf, lora
from jaxpost.models.adapter import Adapter
from jaxpost.sampling.engine import Sampling, sample, visible_text
from jaxpost.sampling.local import LocalEngine
from jaxpost.sharding import fetch, make_mesh
from jaxpost.train.adapters import adapter_folder, as_loaded
from jaxpost.train.checkpoint import Checkpointer
from jaxpost.train.folder import is_run, read_config
from jaxpost.train.scores import Scores, answer_document, score_documents, token_documents
from jaxpost.train.setup import Model, open_model, reference_weights, scored_model
from jaxpost.types import Conversation, Origin

SLOTS = 32  # most prompts that are answered at once


@dataclasses.dataclass
class LoadedModel:
    """A model with its weights: to talk to and to export."""

    model: Model
    params: Any
    mesh: Any

    def chat(self, prompt: str | list[dict], max_new_tokens: int = 128, **how) -> str:
        """The answer to a user's words, or to a list of messages that ends with theirs. how: see `complete`."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.answer([messages], max_new_tokens, **how)[0]

    def answer(self, conversations: Sequence[list[dict]], max_new_tokens: int, **how) -> list[str]:
        """Answers to conversations. how: see `complete`."""
        encode = self.model.template.encode
        prompts = [encode(messages, self.model.tokenizer, add_generation_prompt=True) for messages in conversations]
        return self.complete([np.asarray(prompt, np.int32) for prompt in prompts], max_new_tokens, **how)

    def complete(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, *, seed=0, engine=None, **settings
    ) -> list[str]:
        """Continuations of token ids, as text. A prompt that leaves no room loses its beginning.

        settings: fields of Sampling; without any, the likeliest token each time.
        engine: another Engine than that of this process.
        """
        if not prompts:
            return []
        room = max(0, self.model.policy.config.max_positions - max_new_tokens)
        how = Sampling(max_new_tokens, **{"temperature": 0, "stop_ids": self.model.tokenizer.stop_ids, **settings})
        engine = engine or self.engine(slots=min(SLOTS, len(prompts)))
        found = sample(engine, self.params, [prompt[-room:] for prompt in prompts], jax.random.key(seed), settings=how)
        return [visible_text(completion, self.model.tokenizer, how).strip() for (completion,) in found]

    def engine(self, **shape) -> LocalEngine:
        """What samples from the model, with `self.params`. shape: fields of LocalEngine. Raises ConfigError."""
        if getattr(self.model.policy.config, "num_scores", 0):
            raise ConfigError("the model has scores for a head, not words: it scores completions and gives none")
        if isinstance(self.model.policy, Adapter):
            raise ConfigError("model.adapter: somebody else's model only trains; sample from it by its own means")
        return LocalEngine(self.model.policy, self.mesh, decode=self.model.tokenizer.decode, **shape)

    def score(self, prompt: str | list[dict], completions: Sequence[str]) -> Scores:
        """Scores of answers to a user's words, or to a list of messages that ends with theirs, by a reward model.

        Rendered and tokenised as in training. Raises ConfigError for a model without scores, DataError for an answer
        that it cannot read.
        """
        asked = Conversation(({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt))
        model = self.model
        encoding = {"template": model.template, "tokenizer": model.tokenizer}
        encoding["max_tokens"] = model.policy.config.max_positions
        documents = [
            answer_document(asked, text, Origin("completion", n + 1), n, **encoding)
            for n, text in enumerate(completions)
        ]
        return score_documents(model.policy, self.params, self.mesh, documents)

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> Scores:
        """Scores of token ids (prompt and completion, whole), each read at its last token."""
        documents = token_documents(sequences, self.model.policy.config.max_positions)
        return score_documents(self.model.policy, self.params, self.mesh, documents)

    def fingerprint(self) -> str:
        """sha256 of the beginnings of all weights: enough to tell one step of training from the next."""
        cut = lambda leaf: leaf[(*(slice(0, 1) for _ in leaf.shape[:-1]), slice(0, 16))]  # noqa: E731
        beginnings = fetch(jax.jit(lambda tree: jax.tree.map(cut, tree))(self.params))
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(beginnings):
            digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    def export(self, path, *, merge: bool = False) -> None:
        """Writes the weights in Hugging Face layout, with config, tokenizer and template files.

        Of a model with adapters: these alone, in the layout of PEFT, or with merge=True a whole model with them worked
        into its weights (what was quantised is written as it was computed with).
        """
        if isinstance(self.model.policy, Adapter):
            raise ConfigError("model.adapter: somebody else's model has no Hugging Face layout; see the checkpoints")
        files = self.model.tokenizer.files() | self.model.template.files()
        policy, params = self.model.policy, self.params
        if policy.lora is not None and not merge:
            base = hf.fingerprint(self.model.path)
            hf.export_adapter(path, lora.split(params)[1], policy, self.model.name, files, trained_on=base)
            return
        if merge and policy.lora is None:
            raise ConfigError("merge: the model has no adapters to merge")
        if merge:
            policy, params = dataclasses.replace(policy, lora=None), lora.merged(params, policy.lora)
        hf.export(path, params, policy, files)

    def with_adapter(self, path, *, any_base: bool = False) -> "LoadedModel":
        """The same base with the adapter in a folder in the layout of PEFT; the base's arrays are shared.

        any_base: take one that was trained on other weights of the same shapes. Raises ConfigError for a folder without
        an adapter, CheckpointError for another model's.
        """
        folder = adapter_folder(os.fspath(path))
        base, params = self.model.base, self.params
        if base is None:
            base = dataclasses.replace(self.model, loader=lambda: params)
        model = as_loaded(dataclasses.replace(self.model, base=base), folder, self.mesh, any_base=any_base)
        return LoadedModel(model, model.load(), self.mesh)


@dataclasses.dataclass
class Run(LoadedModel):
    """A stage's result."""

    folder: epath.Path
    state: Any  # TrainState
    rows: list[dict]  # of metrics.jsonl
    finished: bool  # False: stopped by SIGTERM and saved, to be resumed
    evaluate: Callable[[], dict[str, float]]  # metrics of these weights on the evaluation data
    halted: str | None = None  # the rule of halt_when that ended it, and the last checkpoint from before

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """{name: f64[n, 2]}: (step, value) of each row of metrics.jsonl that has the name."""
        found: dict[str, list] = {}
        for row in self.rows:
            for name, value in row.items():
                if name != "step":
                    found.setdefault(name, []).append((row["step"], value))
        return {name: np.array(values, np.float64) for name, values in found.items()}


def load_model(path: str, *, template: str | None = None, weights: bool = True, mesh=None, frozen=False) -> LoadedModel:
    """A model by path (as `model.path`), or the newest weights of a run folder; its head may be of words or of scores.

    template: chat template of a model that has none of its own. weights: False leaves params and mesh None.
    mesh: None is all devices, for a run as its config has them. frozen: held in the type that it computes in.
    Raises CheckpointError for a run without a checkpoint that can be read, or a folder without a model.
    """
    if is_run(path):
        return _load_run(path, weights=weights, mesh=mesh, frozen=frozen)
    values = {"stage": "sft", "model": {"path": path}, "data": {"train": "embedded"}, "run": {"steps": 1}}
    config = configs.resolve(values | {"tokenizer": {"template": template}})
    mesh = (mesh or make_mesh()) if weights else None
    model = open_model(config, mesh, any_head=True)
    model = reference_weights(config, model) if frozen and weights else model
    return LoadedModel(model, model.load() if weights else None, mesh)


def _load_run(folder, *, weights: bool, mesh, frozen: bool) -> LoadedModel:
    config = read_config(folder)
    if not weights:
        return LoadedModel(open_model(config, None), None, None)
    mesh = mesh or _mesh_of(config)
    model = open_model(config, mesh)
    with Checkpointer(epath.Path(folder) / "checkpoints", read_only=True) as checkpoints:
        if config.stage in STAGES_THAT_SAMPLE:  # there a value model trains beside the policy
            params = checkpoints.restore_params({"policy": model.sharded}, partly=True)["policy"]
        else:
            params = checkpoints.restore_params(model.sharded)
        extra = checkpoints.extra(checkpoints.restored)
    if frozen:
        model = reference_weights(config, model)
        params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, model.abstract)
    return LoadedModel(scored_model(model, extra), model.policy.whole(params, model.load_frozen()), mesh)


def _mesh_of(config):
    """As the config has it, or over all devices where there are others now."""
    sizes, devices = dataclasses.asdict(config.mesh), jax.device_count()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    fits = devices % fixed == 0 if -1 in sizes.values() else devices == fixed
    return make_mesh(**sizes if fits else {})
