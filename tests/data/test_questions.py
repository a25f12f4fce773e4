"""What is asked in a record: the prompt of any format."""

import re

import pytest

from jaxpost.data.questions import question
from jaxpost.errors import DataError
from jaxpost.types import Conversation, Origin

HERE = Origin("a.jsonl", 3)
SYSTEM, USER, ANSWER = (
    {"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes."))
)
TOOL = {"type": "function", "function": {"name": "now"}}
ASKED = Conversation((USER,))


@pytest.mark.parametrize(
    "record, prompt",
    [
        ({"prompt": "Once upon"}, "Once upon"),
        ({"prompt": "Once upon", "completion": " a time"}, "Once upon"),
        ({"prompt": "Once upon", "answer": "a time", "id": 4}, "Once upon"),
        ({"prompt": [USER], "label": True}, ASKED),
        ({"prompt": [SYSTEM, USER], "tools": [TOOL]}, Conversation((SYSTEM, USER), (TOOL,))),
        ({"messages": [USER]}, ASKED),
        ({"messages": [USER], "answer": "Yes.", "relation": "x"}, ASKED),
        ({"messages": [SYSTEM, USER, ANSWER], "tools": [TOOL]}, Conversation((SYSTEM, USER), (TOOL,))),
        ({"messages": [USER, ANSWER, USER]}, Conversation((USER, ANSWER, USER))),
        ({"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Yes."}]}, ASKED),
        ({"question": "Hi.", "answer": "Yes."}, ASKED),
        ({"instruction": "Hi.", "input": "", "output": "Yes."}, ASKED),
        ({"prompt": "Hi.", "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No."}]}, ASKED),
        ({"prompt": "Q", "completions": ["a", "b"]}, "Q"),
        ({"chosen": "\n\nHuman: Hi.\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi.\n\nAssistant: No."}, ASKED),
    ],
)
def test_the_prompt_of_a_record(record, prompt):
    found = question(record, HERE)
    assert (found.kind, found.prompt, found.completions, found.origin) == ("prompt", prompt, (), HERE)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "Once upon"}, "a.jsonl:3: format text asks nothing; wanted prompt, messages or conversations"),
        ({"messages": [ANSWER]}, "a.jsonl:3: prompt must be a list of at least one message"),
        ({"messages": [USER, ANSWER, ANSWER]}, "a.jsonl:3: the last message of a prompt is the assistant's"),
        ({"messages": [USER, SYSTEM]}, "a.jsonl:3: the system message is message 2"),
        ({"messages": "Hi."}, "a.jsonl:3: messages must be a list"),
        ({"prompt": 4}, "a.jsonl:3: prompt must be"),
        ({"words": "Hi."}, "a.jsonl:3: no format fits"),
    ],
)
def test_a_record_that_asks_nothing_is_named(record, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        question(record, HERE)
