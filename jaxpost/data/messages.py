"""Messages as chat templates expect them: `role`, `content` as text, `tool_calls` with arguments as an object.

They are read from OpenAI's writing (`role`, `content`, `tool_calls`) and from ShareGPT's (`from`, `value`). A fault of
one example is an `ExampleFault`, whose `reason` is a slug for counting.
"""

import json

from jaxpost.errors import DataError
from jaxpost.types import Origin

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


class ExampleFault(DataError):
    """A fault of one example, as against one of its file: it may be dropped and counted under `reason`."""

    def __init__(self, reason: str, detail: str, origin: Origin | None = None):
        self.reason, self.detail, self.origin = reason, detail, origin
        super().__init__(f"{origin}: {detail} ({reason})" if origin else f"{detail} ({reason})")


def as_text(value, key: str) -> str:
    if not isinstance(value, str):
        raise ExampleFault("not_text", f"{key} must be text, found {type(value).__name__}")
    return value


def as_messages(value, key: str) -> tuple[dict, ...]:
    """A list of OpenAI messages, or one of them alone."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ExampleFault("no_messages", f"{key} must be a list of at least one message")
    return tuple(_message(message) for message in value)


def _message(message) -> dict:
    if not isinstance(message, dict) or "role" not in message:
        raise ExampleFault("not_a_message", "a message must be an object with role and content")
    # OpenAI's older names for calls and their results.
    role = "tool" if message["role"] == "function" else message["role"]
    if role not in ROLES:
        raise ExampleFault("unknown_role", f"unknown role {role!r}; known are {', '.join(ROLES)}")
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if not isinstance(calls, list):
        raise ExampleFault("bad_tool_call", "tool_calls must be a list")
    # Many templates ask only whether there are tool_calls, so an empty list or null goes.
    kept = {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    made = {**kept, "role": role, "content": _content(message.get("content"))}
    return made | ({"tool_calls": [_tool_call(call) for call in calls]} if calls else {})


def _content(value) -> str:
    """Content as text; a list of text blocks is joined, None (beside tool calls) is empty."""
    if isinstance(value, list) and all(isinstance(block, dict) and block.get("type") == "text" for block in value):
        return "".join(as_text(block.get("text"), "a text block") for block in value)
    return "" if value is None else as_text(value, "content")


def _tool_call(call) -> dict:
    """OpenAI's {"type", "function": {"name", "arguments"}}; the function may stand bare, arguments be a JSON string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ExampleFault("bad_tool_call", "a tool call must be an object with the function's name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = from_json(arguments, "arguments of a tool call")
    arguments = arguments or {}
    if not isinstance(arguments, dict):
        raise ExampleFault("bad_tool_call", f"arguments must be a JSON object, found {type(arguments).__name__}")
    outer = call if "function" in call else {}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def as_tools(tools) -> tuple[dict, ...] | None:
    """The tools offered, as OpenAI function objects; ShareGPT files hold them as a JSON string."""
    if isinstance(tools, str):
        tools = from_json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ExampleFault("bad_tools", "tools must be a list of objects")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def from_json(text: str, key: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ExampleFault("bad_json", f"{key} is not JSON ({error.msg})") from None


def from_sharegpt(turns, key: str) -> tuple[dict, ...]:
    """A list of ShareGPT turns, or one of them alone."""
    if isinstance(turns, dict):
        turns = [turns]
    if not isinstance(turns, list) or not turns:
        raise ExampleFault("no_messages", f"{key} must be a list of at least one turn")
    return tuple(_sharegpt_turn(turn) for turn in turns)


def _sharegpt_turn(turn) -> dict:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ExampleFault("not_a_message", "a turn must be an object with from and value")
    value = as_text(turn["value"], "value")
    if turn["from"] == "function_call":
        calls = from_json(value, "function_call")
        calls = [_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if turn["from"] not in SHAREGPT_ROLES:
        known = ", ".join((*SHAREGPT_ROLES, "function_call"))
        raise ExampleFault("unknown_role", f"unknown role {turn['from']!r}; known are {known}")
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": value}


def check_conversation(messages: tuple[dict, ...], completion: tuple[dict, ...]) -> None:
    """Raises ExampleFault: a system message that is not the first, a completion with no or an empty assistant turn."""
    check_system(messages)
    turns = [message for message in completion if message["role"] == "assistant"]
    if not turns:
        raise ExampleFault("no_assistant_turn", "no assistant turn to train on")
    if any(not turn["content"].strip() and not turn.get("tool_calls") for turn in turns):
        raise ExampleFault("empty_completion", "an assistant turn is empty")


def check_system(messages: tuple[dict, ...]) -> None:
    systems = [i for i, message in enumerate(messages) if message["role"] in ("system", "developer")]
    if len(systems) > 1:
        raise ExampleFault("two_system_messages", f"{len(systems)} system messages; at most one, at the start")
    if systems and systems[0] > 0:
        raise ExampleFault("system_not_first", f"the system message is message {systems[0] + 1}, not the first")
