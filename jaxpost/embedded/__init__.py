"""A small world that ships with the package: every stage shows its effect on a laptop in minutes.

369 true facts in eleven relations, a tokenizer, a base model pretrained on text about them, an SFT checkpoint, a reward
model, and the data of each stage. Everything under `files/` is written by `python -m jaxpost.embedded.make` from one
seed.
Held-out facts are stated in the pretraining text; no dialogue or pair that is trained on asks them.

Beside it, `shapes/` holds the config.json of published models, without weights: what plans are made of (`shape:NAME`).
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

from jaxpost.embedded.dialogues import Score, score
from jaxpost.errors import ConfigError
from jaxpost.keys import STAGES_OF_PAIRS

__all__ = ["Score", "evaluate", "path", "prompts", "resolve", "score", "sources"]

FILES = {
    "base": "base",  # model folders in Hugging Face layout
    "sft": "sft",
    "reward": "reward",  # scores answers, with four heads
    "corpus": "corpus.jsonl.gz",  # raw text, what the base was pretrained on
    "replay": "replay.jsonl.gz",  # a little of it, mixed into SFT against forgetting
    "instructions": "instructions.jsonl.gz",
    "instructions_eval": "instructions_eval.jsonl",
    "preferences": "preferences.jsonl.gz",
    "preferences_eval": "preferences_eval.jsonl.gz",
    "comparisons": "comparisons.jsonl.gz",  # pairs for reward models, which need more of them: on trained facts
    "comparisons_eval": "comparisons_eval.jsonl.gz",
    "judged": "judged.jsonl.gz",  # drawn answers of the SFT model beside better ones
    "prompts": "prompts.jsonl",  # held-out questions with the exact sentence that answers each
    "questions": "questions.jsonl.gz",  # the same on trained facts, each in every form
}
# What `embedded` means as data of a stage: [(file, weight), ...] by stage and split.
DATA = {
    ("sft", "train"): (("instructions", 1.0), ("replay", 1.0)),
    ("sft", "eval"): (("instructions_eval", 1.0),),
    ("distill", "train"): (("instructions", 1.0), ("replay", 1.0)),
    ("distill", "eval"): (("instructions_eval", 1.0),),
    **{(stage, "train"): (("preferences", 1.0),) for stage in (*STAGES_OF_PAIRS, "kto")},
    **{(stage, "eval"): (("preferences_eval", 1.0),) for stage in (*STAGES_OF_PAIRS, "kto")},
    ("reward", "train"): (("comparisons", 1.0),),
    ("reward", "eval"): (("comparisons_eval", 1.0),),
    ("ppo", "train"): (("questions", 1.0),),
    ("ppo", "eval"): (("prompts", 1.0),),
}


def path(name: str) -> pathlib.Path:
    """Where a file or model folder of the world lies. Raises ConfigError for a name that is not in `FILES`."""
    if name not in FILES:
        raise ConfigError(f"embedded:{name}: no such part of the embedded world; known are {', '.join(FILES)}")
    return pathlib.Path(__file__).parent / "files" / FILES[name]


def resolve(location: str) -> str:
    """`embedded:NAME` and `shape:NAME` as paths; any other location unchanged. Raises ConfigError."""
    prefix, _, name = str(location).partition(":")
    if prefix == "shape":
        shapes = pathlib.Path(__file__).parent / "shapes"
        known = sorted(folder.name for folder in shapes.iterdir())
        if name not in known:
            raise ConfigError(f"{location}: no such shape; known are {', '.join(known)}")
        return str(shapes / name)
    return str(path(name)) if prefix == "embedded" else location


def sources(locations: Iterable[tuple[str, float | dict]], stage: str, split: str) -> list[tuple[str, float | dict]]:
    """`(location, weight or budget)` pairs with `embedded` replaced by the world's files for this stage and split.

    Raises ConfigError where the world has no data for the stage.
    """
    found = []
    for location, weight in locations:
        if location != "embedded":
            found.append((resolve(location), weight))
        elif isinstance(weight, dict):
            files = ", ".join(f"embedded:{name}" for name, _ in DATA.get((stage, split), ()))
            raise ConfigError(f"data.{split}: a budget of tokens is of one file, `embedded` is several: {files}")
        elif (stage, split) in DATA:
            found += [(str(path(name)), weight * share) for name, share in DATA[stage, split]]
        else:
            raise ConfigError(f"data.{split}: the embedded world has no data for the stage {stage}")
    return found


def prompts() -> list[dict]:
    """The held-out questions: `{"messages": [one user turn], "answer": exact sentence, "relation": name}`."""
    return [json.loads(line) for line in path("prompts").read_text(encoding="utf-8").splitlines()]


def evaluate(ask: Callable[[list[str]], Sequence[str]]) -> dict[str, float]:
    """What `ask` (questions -> answers as text) is worth by the world's own rule, as means over the held-out questions.

    Returns `answered`, `correct`, `polite` (shares) and `words` (mean words of an answer); see `Score`.
    """
    questions = [prompt["messages"][-1]["content"] for prompt in prompts()]
    scores = [score(question, text) for question, text in zip(questions, ask(questions), strict=True)]
    names = ("answered", "correct", "polite", "words")
    return {name: sum(float(getattr(s, name)) for s in scores) / len(scores) for name in names}
