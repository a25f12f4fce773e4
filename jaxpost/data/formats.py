"""Formats: from a record of a file to an `Example`. A format is one registered function.

Which format a file has is read off the keys of its records (`detect`). Only keys that mean something to some format
(`KEYS`) count; a record that fits none or several is an error that lists the formats, never a guess.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable

from etils import epath

from jaxpost.data.messages import (
    ExampleFault,
    as_messages,
    as_text,
    as_tools,
    check_conversation,
    check_system,
    from_sharegpt,
)
from jaxpost.errors import DataError
from jaxpost.types import Conversation, Origin

Completed = str | tuple[dict, ...]  # raw text, or the messages that complete a conversation


@dataclasses.dataclass(frozen=True)
class Example:
    """One example before tokenising.

    kind "text": `prompt` is None or raw text that is not trained, `completions` one raw text.
    kind "chat": `prompt` holds the messages that are only seen (often none) and the tools, `completions` one tuple of
      messages, whose assistant turns are trained.
    The others have `prompt` as raw text or as a Conversation, and their completions in the same form:
    kind "preference": `completions` are chosen and rejected; read as "scored", `values["score"]` says how good each is.
    kind "ranking": `completions` are two or more, best first, and `values["score"]` says how good each is. Some of the
      scores may be equal, never all.
    kind "unpaired": completions that stand alone, and `values["label"]` is 1 where one is good, 0 where it is bad.
    kind "stepwise": one completion, the `steps` joined by newlines, and `values["label"]` says of each how right it is,
      0 to 1.
    kind "prompt": no completion: a question to be answered by the model.
    """

    kind: str
    prompt: Conversation | str | None
    completions: tuple[Completed, ...]
    origin: Origin
    format: str
    values: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # one per completion, or per step
    steps: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Format:
    """`required` and `optional` keys; `kind` is what it trains: "sft", "preference", "ranking", "stepwise",
    "unpaired", "prompt".

    beside: the file, relative to this one's folder, whose record with the same `id` adds its keys; "{name}" is the name
    of this one.
    """

    name: str
    kind: str
    required: frozenset[str]
    optional: frozenset[str]
    parse: Callable[[dict], tuple]
    beside: str | None = None

    def fits(self, kind: str) -> bool:
        """Whether it can be read as this kind: a pair is also a ranking of two, with scores a scored one, and a good
        completion and a bad one; and all but raw text ask something."""
        if kind == "prompt":
            return self.name != "text"
        return kind == self.kind or (self.kind == "preference" and kind in ("ranking", "scored", "unpaired"))


FORMATS: dict[str, Format] = {}
KEYS: set[str] = set()  # what any format reads


def register(name: str, kind: str, required: str, optional: str = "", beside: str | None = None):
    """Registers `parse(record) -> (kind, prompt, completions[, values[, steps]])` under a name, with its keys."""

    def add(parse):
        FORMATS[name] = Format(name, kind, frozenset(required.split()), frozenset(optional.split()), parse, beside)
        KEYS.update(required.split(), optional.split())
        return parse

    return add


def detect(record: dict, origin: Origin) -> str:
    """The one format whose keys the record has. Raises DataError where none or several fit."""
    keys = KEYS & record.keys()
    fitting = [f.name for f in FORMATS.values() if f.required <= keys <= f.required | f.optional]
    if len(fitting) == 1:
        return fitting[0]
    found = "no format fits" if not fitting else f"several formats fit ({', '.join(fitting)})"
    raise DataError(
        f"{origin}: {found} a record with the keys {', '.join(sorted(record)) or '(none)'}; "
        f"set data.format to one of {', '.join(FORMATS)}"
    )


def parse(record: dict, origin: Origin, format: str = "auto", kind: str | None = None) -> Example:
    """A record as Example. What a pair becomes of another kind: "ranking", one of two; "scored", with its scores;
    "unpaired", a good completion and a bad one.

    Raises DataError (unknown format, missing key) and ExampleFault (a fault of this example alone).
    """
    name = detect(record, origin) if format == "auto" else format
    if name not in FORMATS:
        raise DataError(f"data.format: no format is called {name!r}; known are {', '.join(FORMATS)}")
    needs(record, origin, name)
    try:
        if FORMATS[name].beside:
            record = _joined(record, origin, FORMATS[name].beside)
        found, prompt, completions, *values = FORMATS[name].parse(record)
        _check(found, prompt, completions)
    except ExampleFault as fault:
        raise ExampleFault(fault.reason, fault.detail, origin) from None
    if (found, kind) == ("preference", "ranking"):
        found, values = "ranking", [{"score": (1.0, 0.0)}]
    if (found, kind) == ("preference", "unpaired"):
        found, values = "unpaired", [{"label": (1.0, 0.0)}]
    if (found, kind) == ("preference", "scored"):
        values = [{"score": _pair_scores(record, origin)}]
    return Example(found, prompt, completions, origin, name, *values)


def needs(record: dict, origin: Origin, name: str) -> None:
    """Raises DataError where the record lacks a key of the format."""
    if missing := FORMATS[name].required - record.keys():
        raise DataError(
            f"{origin}: format {name} needs the key {', '.join(sorted(missing))}, found {', '.join(sorted(record))}"
        )


def _check(kind: str, prompt, completions: tuple[Completed, ...]) -> None:
    for completion in completions:
        if isinstance(completion, str):
            if not completion.strip():
                raise ExampleFault("empty_completion", "a completion is empty")
        else:
            check_conversation((*prompt.messages, *completion), completion)
    if kind == "prompt" and not isinstance(prompt, str):
        check_system(prompt.messages)
        if prompt.messages[-1]["role"] == "assistant":
            raise ExampleFault("answered", "the last message of a prompt is the assistant's")
    if kind == "preference" and completions[0] == completions[1]:
        raise ExampleFault("chosen_equals_rejected", "chosen and rejected are the same")
    if any(one == other for i, one in enumerate(completions) for other in completions[:i]):
        raise ExampleFault("equal_completions", "two of the completions are the same")


def _joined(record: dict, origin: Origin, beside: str) -> dict:
    """The record with the keys of the one in the file beside that has the same id."""
    other = file_beside(origin.path, beside)
    if record.get("id") not in (found := _by_id(other)):
        raise ExampleFault("not_beside", f"{other} has no record with the id {record.get('id')!r}")
    return found[record["id"]] | record


def file_beside(path: str, beside: str) -> str:
    """The file that completes the records of `path`; see `Format.beside`."""
    return str(epath.Path(path).parent / beside.format(name=epath.Path(path).name))


@functools.lru_cache(maxsize=4)
def _by_id(path: str) -> dict:
    if not epath.Path(path).exists():
        raise DataError(f"{path}: no such file; the records of this format belong to those of that file, by their id")
    try:
        return {record["id"]: record for record in map(json.loads, epath.Path(path).read_text().splitlines())}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: must hold one JSON object with an id on each line") from None


# --- formats for supervised training ----------------------------------------------------------------------------------


@register("messages", "sft", "messages", "tools")
def messages_format(record: dict):
    """messages: [{role, content}, ...], every assistant turn trained"""
    return "chat", Conversation((), as_tools(record.get("tools"))), (as_messages(record["messages"], "messages"),)


@register("sharegpt", "sft", "conversations", "tools system")
def sharegpt(record: dict):
    """conversations: [{from: human|gpt|system|function_call|observation, value}, ...]"""
    return "chat", Conversation((), as_tools(record.get("tools"))), (_sharegpt(record),)


@register("alpaca", "sft", "instruction output", "input system history text")
def alpaca(record: dict):
    """instruction, input (may be empty), output; optional system and history of [user, assistant] pairs"""
    question = as_text(record["instruction"], "instruction")
    extra = as_text(record.get("input") or "", "input")
    turns = [{"role": "system", "content": as_text(record["system"], "system")}] if record.get("system") else []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ExampleFault("not_a_message", "history must be a list of [user, assistant] pairs")
        turns += [
            {"role": role, "content": as_text(text, "history")}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    turns.append({"role": "user", "content": f"{question}\n{extra}" if extra else question})
    return "chat", Conversation(tuple(turns)), (_answer(record["output"], "output"),)


@register("prompt_completion", "sft", "prompt completion", "tools")
def prompt_completion(record: dict):
    """prompt and completion: both raw text (no template), or both lists of messages"""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        return "text", prompt, (as_text(completion, "completion"),)
    conversation = Conversation(as_messages(prompt, "prompt"), as_tools(record.get("tools")))
    return "chat", conversation, (as_messages(completion, "completion"),)


@register("text", "sft", "text")
def text_format(record: dict):
    """text: raw text, every token trained"""
    return "text", None, (as_text(record["text"], "text"),)


@register("question_answer", "sft", "question answer")
def question_answer(record: dict):
    """question and answer, as in gsm8k"""
    prompt = Conversation(({"role": "user", "content": as_text(record["question"], "question")},))
    return "chat", prompt, (_answer(record["answer"], "answer"),)


@register("bfcl_answer", "sft", "ground_truth", beside="../{name}")
def bfcl_answer(record: dict):
    """BFCL's possible_answer/NAME: the first accepted call for the question of that id in ../NAME"""
    _, prompt, _ = bfcl(record)
    truth = record["ground_truth"]
    if not isinstance(truth, list) or not all(isinstance(call, dict) for call in truth):
        raise ExampleFault("bad_tool_call", "ground_truth must be a list of objects")
    calls = [{"name": name, "arguments": _accepted(arguments)} for call in truth for name, arguments in call.items()]
    return "chat", prompt, (as_messages([{"role": "assistant", "tool_calls": calls}], "ground_truth"),)


# --- formats of preference pairs --------------------------------------------------------------------------------------


@register("preference", "preference", "prompt chosen rejected", "tools")
def preference(record: dict):
    """prompt, chosen, rejected: all raw text (no template), or lists of messages"""
    prompt, chosen, rejected = (record[key] for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = as_messages(chosen, "chosen"), as_messages(rejected, "rejected")
        if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):  # whole dialogues beside a copy of their first question
            return _split_dialogues(chosen, rejected, as_tools(record.get("tools")))
        return (
            "preference",
            Conversation(as_messages(prompt, "prompt"), as_tools(record.get("tools"))),
            (chosen, rejected),
        )
    return "preference", as_text(prompt, "prompt"), (as_text(chosen, "chosen"), as_text(rejected, "rejected"))


@register("dialogue_pair", "preference", "chosen rejected", "tools")
def dialogue_pair(record: dict):
    """chosen and rejected: whole dialogues with a common beginning, as "\\n\\nHuman: ..." text or messages"""
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        pair = [_split_turns(chosen), _split_turns(rejected)]
        # People type these markers too, so only a dialogue that differs in its last turn alone is taken.
        if pair[0][:-1] != pair[1][:-1]:
            raise ExampleFault("prompts_differ", "chosen and rejected differ before their last turn")
    else:
        pair = [as_messages(chosen, "chosen"), as_messages(rejected, "rejected")]
    return _split_dialogues(*pair, as_tools(record.get("tools")))


@register("sharegpt_preference", "preference", "conversations chosen rejected", "tools system")
def sharegpt_preference(record: dict):
    """conversations: [{from, value}, ...]; chosen and rejected: one such turn each, or a list of them"""
    prompt = Conversation(_sharegpt(record), as_tools(record.get("tools")))
    return (
        "preference",
        prompt,
        (from_sharegpt(record["chosen"], "chosen"), from_sharegpt(record["rejected"], "rejected")),
    )


# --- rankings, feedback on single answers, prompts ------------------------------------------------------------------


@register("ranking", "ranking", "prompt completions", "scores tools")
def ranking(record: dict):
    """prompt and completions (all raw text, or messages), best first; or in any order with scores, one each"""
    prompt, completions = record["prompt"], record["completions"]
    if not isinstance(completions, list):
        raise ExampleFault("not_a_list", "completions must be a list")
    if isinstance(prompt, str) and all(isinstance(completion, str) for completion in completions):
        return _ranked(prompt, completions, record.get("scores"))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = Conversation(as_messages(prompt, "prompt"), as_tools(record.get("tools")))
    return _ranked(prompt, [as_messages(completion, "completions") for completion in completions], record.get("scores"))


GSM8K_MODELS = "6b_finetuning 6b_verification 175b_finetuning 175b_verification"


@register("gsm8k_solutions", "ranking", f"question ground_truth {GSM8K_MODELS}")
def gsm8k_solutions(record: dict):
    """gsm8k's example_model_solutions: four models' solutions of each question, the correct ones first"""
    prompt = Conversation(({"role": "user", "content": as_text(record["question"], "question")},))
    solutions = [record[model] for model in GSM8K_MODELS.split()]
    if not all(isinstance(solution, dict) and {"solution", "is_correct"} <= solution.keys() for solution in solutions):
        raise ExampleFault("bad_solution", "each model's entry must be an object with solution and is_correct")
    completions = [_answer(solution["solution"], "solution") for solution in solutions]
    return _ranked(prompt, completions, [float(solution["is_correct"]) for solution in solutions])


@register("stepwise", "stepwise", "prompt completions labels", "tools")
def stepwise(record: dict):
    """prompt (raw text, or messages), completions: the steps of one answer, and labels: of each, true where right"""
    steps, labels = record["completions"], record["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or not 0 < len(steps) == len(labels):
        raise ExampleFault("bad_labels", "completions and labels must be lists of equally many, at least one")
    if not all(_is_number(label) or isinstance(label, bool) for label in labels) or not all(
        0 <= x <= 1 for x in labels
    ):
        raise ExampleFault("bad_labels", f"labels must be true, false or numbers from 0 to 1, found {labels}")
    if not all(as_text(step, "completions").strip() for step in steps):
        raise ExampleFault("empty_completion", "a step is empty")
    answer, values = "\n".join(steps), {"label": tuple(map(float, labels))}
    if isinstance(record["prompt"], str):
        return "stepwise", record["prompt"], (answer,), values, tuple(steps)
    prompt = Conversation(as_messages(record["prompt"], "prompt"), as_tools(record.get("tools")))
    return "stepwise", prompt, (_answer(answer, "completions"),), values, tuple(steps)


@register("unpaired", "unpaired", "prompt completion label", "tools")
def unpaired(record: dict):
    """prompt and completion (both raw text, or messages), and label: true where the completion is good"""
    _, prompt, completions = prompt_completion(record)
    return "unpaired", prompt, completions, _label(record)


@register("unpaired_messages", "unpaired", "messages label", "tools")
def unpaired_messages(record: dict):
    """messages, and label: true where the last of them, the assistant's, is good"""
    *seen, judged = as_messages(record["messages"], "messages")
    return "unpaired", Conversation(tuple(seen), as_tools(record.get("tools"))), ((judged,),), _label(record)


@register("unpaired_sharegpt", "unpaired", "conversations label", "tools system")
def unpaired_sharegpt(record: dict):
    """conversations: [{from, value}, ...], and label: true where the last turn is good"""
    *seen, judged = _sharegpt(record)
    return "unpaired", Conversation(tuple(seen), as_tools(record.get("tools"))), ((judged,),), _label(record)


@register("prompt", "prompt", "prompt", "tools")
def prompt_format(record: dict):
    """prompt: a question as raw text, or messages"""
    if isinstance(record["prompt"], str):
        return "prompt", as_text(record["prompt"], "prompt"), ()
    return "prompt", Conversation(as_messages(record["prompt"], "prompt"), as_tools(record.get("tools"))), ()


@register("bfcl", "prompt", "question function")
def bfcl(record: dict):
    """BFCL's questions: question (a list of one list of messages) and function (the tools offered)"""
    if not isinstance(record["question"], list) or len(record["question"]) != 1:
        raise ExampleFault("several_turns", "question must be a list of one list of messages")
    return (
        "prompt",
        Conversation(as_messages(record["question"][0], "question"), as_tools(_json_schema(record["function"]))),
        (),
    )


# --- shared by formats ------------------------------------------------------------------------------------------------


def _sharegpt(record: dict) -> tuple[dict, ...]:
    """The turns of `conversations`, after the system message that may stand in a key of its own."""
    system = record.get("system")
    first = ({"role": "system", "content": as_text(system, "system")},) if system else ()
    return first + from_sharegpt(record["conversations"], "conversations")


def _split_turns(text: str) -> tuple[dict, ...]:
    """The turns of a dialogue in hh-rlhf's writing: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    head, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if head.strip() or not parts:
        raise ExampleFault("no_messages", 'a dialogue must begin with "\\n\\nHuman:" or "\\n\\nAssistant:"')
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        {"role": roles[who], "content": what.strip()} for who, what in zip(parts[::2], parts[1::2], strict=True)
    )


def _split_dialogues(chosen: tuple[dict, ...], rejected: tuple[dict, ...], tools):
    """The common beginning is the prompt; what follows must begin with an assistant turn on both sides."""
    if chosen == rejected:
        raise ExampleFault("chosen_equals_rejected", "chosen and rejected are the same")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    ends = chosen[common:], rejected[common:]
    if not all(end and end[0]["role"] == "assistant" for end in ends):
        raise ExampleFault("prompts_differ", "chosen and rejected part before an assistant turn")
    return "preference", Conversation(chosen[:common], tools), ends


def _answer(text, key: str) -> tuple[dict]:
    return ({"role": "assistant", "content": as_text(text, key)},)


def _ranked(prompt, completions: list[Completed], scores):
    """Best first by score; without scores the order given counts, and the scores are N-1, ..., 0."""
    if len(completions) < 2:
        raise ExampleFault("single_completion", f"a ranking needs two completions, found {len(completions)}")
    if scores is None:
        scores = range(len(completions))[::-1]
    elif not isinstance(scores, list) or not all(_is_number(score) for score in scores):
        raise ExampleFault("bad_scores", "scores must be a list of finite numbers")
    if len(scores) != len(completions):
        raise ExampleFault("bad_scores", f"{len(completions)} completions, but {len(scores)} scores")
    if len(set(scores)) == 1:
        raise ExampleFault("tie", f"all completions have the score {scores[0]}")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return "ranking", prompt, tuple(completions[i] for i in order), {"score": tuple(float(scores[i]) for i in order)}


def _pair_scores(record: dict, origin: Origin) -> tuple[float, float]:
    """`score_chosen` and `score_rejected`, or a `margin` and 0: the first is larger."""
    scores = (
        (record["margin"], 0.0) if "margin" in record else (record.get("score_chosen"), record.get("score_rejected"))
    )
    if None in scores:
        raise ExampleFault("no_score", "found neither margin nor score_chosen and score_rejected", origin)
    if not all(_is_number(score) for score in scores):
        raise ExampleFault("bad_scores", f"expected finite numbers, found {scores[0]!r} and {scores[1]!r}", origin)
    if scores[0] <= scores[1]:
        raise ExampleFault("no_winner", f"chosen has the score {scores[0]}, rejected {scores[1]}", origin)
    return tuple(map(float, scores))


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _label(record: dict) -> dict[str, tuple[float]]:
    if not isinstance(record["label"], int | float) or record["label"] not in (0, 1):
        raise ExampleFault("bad_label", f"label must be true or false, found {record['label']!r}")
    return {"label": (float(record["label"]),)}


BFCL_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}  # as BFCL itself maps them


def _json_schema(value):
    """BFCL's Python types as those of JSON schema, at any depth."""
    if isinstance(value, list):
        return [_json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {key: _json_schema(item) for key, item in value.items()}
    return made | ({"type": BFCL_TYPES.get(made["type"], made["type"])} if isinstance(made.get("type"), str) else {})


def _accepted(value):
    """The first of the values that BFCL accepts for each argument; one that may be left out, and is first, is."""
    if isinstance(value, list):
        return [_accepted(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _accepted(options[0]) for name, options in value.items() if options and options[0] != ""}
