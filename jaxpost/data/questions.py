"""What is asked in a record of any format: the prompt that a model is to answer."""

from jaxpost.data.formats import FORMATS, Example, parse
from jaxpost.data.messages import ExampleFault
from jaxpost.errors import DataError
from jaxpost.types import Origin


def question(record: dict, origin: Origin) -> Example:
    """The record as an Example of kind "prompt": raw text, which is continued, or a Conversation to be answered.

    Of `messages` or `conversations` all but a last turn of the assistant's; `prompt` as it stands, whatever is beside
    it; of other formats what precedes the answer. Raises DataError, which names file and line.
    """
    if "messages" in record or "conversations" in record:
        return parse(_asked(record, origin), origin, "prompt")
    if "prompt" in record and not record.keys() & {"chosen", "completions"}:  # where it may be a user's words alone
        return parse({key: record[key] for key in ("prompt", "tools") if key in record}, origin, "prompt")
    example = parse(record, origin)
    if example.prompt is None:
        raise DataError(f"{origin}: format {example.format} asks nothing; wanted prompt, messages or conversations")
    return Example("prompt", example.prompt, (), origin, example.format)


def _asked(record: dict, origin: Origin) -> dict:
    name = "messages" if "messages" in record else "sharegpt"
    try:
        _, conversation, (messages,) = FORMATS[name].parse(record)
    except ExampleFault as fault:
        raise ExampleFault(fault.reason, fault.detail, origin) from None
    last = len(messages) - (messages[-1]["role"] == "assistant")
    return {"prompt": list(messages[:last]), "tools": list(conversation.tools or ())}
