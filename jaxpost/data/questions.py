"""What is asked in a record of any format: the prompt that a model is to answer."""

from jaxpost.data.formats import FORMATS, Example, detect, needs, parse
from jaxpost.data.messages import ExampleFault
from jaxpost.errors import DataError
from jaxpost.types import Origin


def asks(record: dict, origin: Origin) -> str:
    """The format by which a record is read as a prompt, whatever is beside it. Raises DataError where none fits."""
    if "messages" in record or "conversations" in record:
        return "messages" if "messages" in record else "sharegpt"
    if "prompt" in record and not record.keys() & {"chosen", "completions"}:  # where it may be a user's words alone
        return "prompt"
    return detect(record, origin)


def question(record: dict, origin: Origin, format: str = "auto") -> Example:
    """The record as an Example of kind "prompt": raw text, which is continued, or a Conversation to be answered.

    Of `messages` or `conversations` all but a last turn of the assistant's; `prompt` as it stands, whatever is beside
    it; of other formats what precedes the answer. Raises DataError, which names file and line.
    """
    name = asks(record, origin) if format == "auto" else format
    if name in ("messages", "sharegpt"):
        return parse(_asked(record, origin, name), origin, "prompt")
    if name == "prompt":
        return parse({key: record[key] for key in ("prompt", "tools") if key in record}, origin, "prompt")
    example = parse(record, origin, name)
    if example.prompt is None:
        raise DataError(f"{origin}: format {example.format} asks nothing; wanted prompt, messages or conversations")
    return Example("prompt", example.prompt, (), origin, example.format)


def read(record: dict, origin: Origin, format: str, kind: str) -> Example:
    """What data of a kind are read by: `question` of the kind "prompt", `parse` of all others."""
    return question(record, origin, format) if kind == "prompt" else parse(record, origin, format, kind)


def _asked(record: dict, origin: Origin, name: str) -> dict:
    needs(record, origin, name)
    try:
        _, conversation, (messages,) = FORMATS[name].parse(record)
    except ExampleFault as fault:
        raise ExampleFault(fault.reason, fault.detail, origin) from None
    last = len(messages) - (messages[-1]["role"] == "assistant")
    return {"prompt": list(messages[:last]), "tools": list(conversation.tools or ())}
