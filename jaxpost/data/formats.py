"""Formats: from a record of a file to an `Example`. A format is one registered function.

Which format a file has is read off the keys of its records (`detect`). Only keys that mean something to some format
(`KEYS`) count; a record that fits none or several is an error that lists the formats, never a guess. A fault of one
example is an `ExampleFault`, whose `reason` is a slug for counting.
"""

import dataclasses
import json
import re
from collections.abc import Callable

from jaxpost.errors import DataError
from jaxpost.types import Conversation, Origin

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
}

Completed = str | tuple[dict, ...]  # raw text, or the messages that complete a conversation


class ExampleFault(DataError):
    """A fault of one example, as against one of its file: it may be dropped and counted under `reason`."""

    def __init__(self, reason: str, detail: str, origin: Origin | None = None):
        self.reason, self.detail, self.origin = reason, detail, origin
        super().__init__(f"{origin}: {detail} ({reason})" if origin else f"{detail} ({reason})")


@dataclasses.dataclass(frozen=True)
class Example:
    """One example before tokenising.

    kind "text": `prompt` is None or raw text that is not trained, `completions` one raw text.
    kind "chat": `prompt` holds the messages that are only seen (often none) and the tools, `completions` one tuple of
      messages, whose assistant turns are trained.
    kind "preference": `completions` are chosen and rejected, in the form that `prompt` has (text or messages).
    """

    kind: str
    prompt: Conversation | str | None
    completions: tuple[Completed, ...]
    origin: Origin
    format: str


@dataclasses.dataclass(frozen=True)
class Format:
    """`required` and `optional` keys; `kind` is what it trains: "sft" or "preference"."""

    name: str
    kind: str
    required: frozenset[str]
    optional: frozenset[str]
    parse: Callable[[dict], tuple]


FORMATS: dict[str, Format] = {}
# Keys of known kinds of data that no format here reads: they keep such files from passing for something else
# (a file of unpaired feedback has messages too, and half of them are bad answers).
KEYS = {"label", "completions", "scores"}


def register(name: str, kind: str, required: str, optional: str = ""):
    """Registers `parse(record) -> (kind, prompt, completions)` under a name, with the keys it reads."""

    def add(parse):
        FORMATS[name] = Format(name, kind, frozenset(required.split()), frozenset(optional.split()), parse)
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


def parse(record: dict, origin: Origin, format: str = "auto") -> Example:
    """A record as Example. Raises DataError (unknown format, missing key) and ExampleFault (see module)."""
    name = detect(record, origin) if format == "auto" else format
    if name not in FORMATS:
        raise DataError(f"data.format: no format is called {name!r}; known are {', '.join(FORMATS)}")
    missing = FORMATS[name].required - record.keys()
    if missing:
        raise DataError(
            f"{origin}: format {name} needs the key {', '.join(sorted(missing))}, found {', '.join(sorted(record))}"
        )
    try:
        kind, prompt, completions = FORMATS[name].parse(record)
        _check(kind, prompt, completions)
    except ExampleFault as fault:
        raise ExampleFault(fault.reason, fault.detail, origin) from None
    return Example(kind, prompt, completions, origin, name)


# --- checks ---------------------------------------------------------------------------------------------------------


def _check(kind: str, prompt, completions: tuple[Completed, ...]) -> None:
    for completion in completions:
        if isinstance(completion, str):
            if not completion.strip():
                raise ExampleFault("empty_completion", "a completion is empty")
        else:
            _check_conversation((*prompt.messages, *completion), completion)
    if kind == "preference" and completions[0] == completions[1]:
        raise ExampleFault("chosen_equals_rejected", "chosen and rejected are the same")


def _check_conversation(messages: tuple[dict, ...], completion: tuple[dict, ...]) -> None:
    systems = [i for i, message in enumerate(messages) if message["role"] in ("system", "developer")]
    if len(systems) > 1:
        raise ExampleFault("two_system_messages", f"{len(systems)} system messages; at most one, at the start")
    if systems and systems[0] > 0:
        raise ExampleFault("system_not_first", f"the system message is message {systems[0] + 1}, not the first")
    turns = [message for message in completion if message["role"] == "assistant"]
    if not turns:
        raise ExampleFault("no_assistant_turn", "no assistant turn to train on")
    if any(not turn["content"].strip() and not turn.get("tool_calls") for turn in turns):
        raise ExampleFault("empty_completion", "an assistant turn is empty")


def _text(value, key: str) -> str:
    if not isinstance(value, str):
        raise ExampleFault("not_text", f"{key} must be text, found {type(value).__name__}")
    return value


def _content(value) -> str:
    """Content as text; a list of text blocks is joined, None (beside tool calls) is empty."""
    if isinstance(value, list) and all(isinstance(block, dict) and block.get("type") == "text" for block in value):
        return "".join(_text(block.get("text"), "a text block") for block in value)
    return "" if value is None else _text(value, "content")


def _message(message) -> dict:
    if not isinstance(message, dict) or "role" not in message:
        raise ExampleFault("not_a_message", "a message must be an object with role and content")
    if message["role"] not in ROLES:
        raise ExampleFault("unknown_role", f"unknown role {message['role']!r}; known are {', '.join(ROLES)}")
    return {**message, "content": _content(message.get("content"))}


def _messages(value, key: str) -> tuple[dict, ...]:
    if not isinstance(value, list) or not value:
        raise ExampleFault("no_messages", f"{key} must be a list of at least one message")
    return tuple(_message(message) for message in value)


def _tools(record: dict) -> tuple[dict, ...] | None:
    """The tools offered, as OpenAI function objects; ShareGPT files hold them as a JSON string."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ExampleFault("bad_tools", "tools must be a list of objects")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _json(text: str, key: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ExampleFault("bad_json", f"{key} is not JSON ({error.msg})") from None


# --- formats for supervised training ----------------------------------------------------------------------------------


@register("messages", "sft", "messages", "tools")
def messages_format(record: dict):
    """messages: [{role, content}, ...], every assistant turn trained"""
    return "chat", Conversation((), _tools(record)), (_messages(record["messages"], "messages"),)


@register("sharegpt", "sft", "conversations", "tools system")
def sharegpt(record: dict):
    """conversations: [{from: human|gpt|system|function_call|observation, value}, ...]"""
    return "chat", Conversation((), _tools(record)), (_sharegpt_messages(record),)


@register("alpaca", "sft", "instruction output", "input system history text")
def alpaca(record: dict):
    """instruction, input (may be empty), output; optional system and history of [user, assistant] pairs"""
    question = _text(record["instruction"], "instruction")
    extra = _text(record.get("input") or "", "input")
    turns = [{"role": "system", "content": _text(record["system"], "system")}] if record.get("system") else []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ExampleFault("not_a_message", "history must be a list of [user, assistant] pairs")
        turns += [
            {"role": role, "content": _text(text, "history")}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    turns.append({"role": "user", "content": f"{question}\n{extra}" if extra else question})
    answer = {"role": "assistant", "content": _text(record["output"], "output")}
    return "chat", Conversation(tuple(turns)), ((answer,),)


@register("prompt_completion", "sft", "prompt completion", "tools")
def prompt_completion(record: dict):
    """prompt and completion: both raw text (no template), or both lists of messages"""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        return "text", prompt, (_text(completion, "completion"),)
    conversation = Conversation(_messages(prompt, "prompt"), _tools(record))
    return "chat", conversation, (_messages(completion, "completion"),)


@register("text", "sft", "text")
def text_format(record: dict):
    """text: raw text, every token trained"""
    return "text", None, (_text(record["text"], "text"),)


# --- formats of preference pairs --------------------------------------------------------------------------------------


@register("preference", "preference", "prompt chosen rejected", "tools")
def preference(record: dict):
    """prompt, chosen, rejected: all raw text (no template), or lists of messages"""
    prompt, chosen, rejected = (record[key] for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
        if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):  # whole dialogues beside a copy of their first question
            return _split_dialogues(chosen, rejected, _tools(record))
        return "preference", Conversation(_messages(prompt, "prompt"), _tools(record)), (chosen, rejected)
    return "preference", _text(prompt, "prompt"), (_text(chosen, "chosen"), _text(rejected, "rejected"))


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
        pair = [_messages(chosen, "chosen"), _messages(rejected, "rejected")]
    return _split_dialogues(*pair, _tools(record))


@register("sharegpt_preference", "preference", "conversations chosen rejected", "tools system")
def sharegpt_preference(record: dict):
    """conversations: [{from, value}, ...]; chosen and rejected: one such turn each"""
    prompt = Conversation(_sharegpt_messages(record), _tools(record))
    return "preference", prompt, ((_sharegpt_turn(record["chosen"]),), (_sharegpt_turn(record["rejected"]),))


# --- shared by formats ------------------------------------------------------------------------------------------------


def _sharegpt_messages(record: dict) -> tuple[dict, ...]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ExampleFault("no_messages", "conversations must be a list of at least one turn")
    system = record.get("system")
    first = ({"role": "system", "content": _text(system, "system")},) if system else ()
    return first + tuple(_sharegpt_turn(turn) for turn in turns)


def _sharegpt_turn(turn) -> dict:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ExampleFault("not_a_message", "a turn must be an object with from and value")
    value = _text(turn["value"], "value")
    if turn["from"] == "function_call":
        call = _json(value, "function_call")
        calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if turn["from"] not in SHAREGPT_ROLES:
        known = ", ".join((*SHAREGPT_ROLES, "function_call"))
        raise ExampleFault("unknown_role", f"unknown role {turn['from']!r}; known are {known}")
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": value}


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
