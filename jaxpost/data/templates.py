"""Chat templates: messages to text, with the characters that are trained.

The text is that of `transformers`, which the model meets in use elsewhere. Trained are the assistant's turns with their
end-of-turn token: by `{% generation %}` blocks where the template has them, else by differences of renderings
(`turns.py`). A control token that somebody typed into a message is told from those that the template writes
(`_typed`), so that nobody can end a turn or forge one.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import re

import jinja2
from etils import epath

from jaxpost.data.jinja import ChatJinja
from jaxpost.data.messages import ExampleFault
from jaxpost.data.tokenizers import NAMED_TEMPLATES, Tokenizer, named_templates
from jaxpost.data.turns import REASONING, Turns
from jaxpost.errors import DataError

logger = logging.getLogger(__name__)

# The fall-back for base models: role lines, EOS after each assistant turn. The space before an answer belongs to the
# answer, so that in use the prompt ends at the colon and " word" is one token, as in training.
PLAIN = """\
{{- bos_token }}
{%- if tools %}{{ 'Tools: ' + tools | tojson + '\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- 'Assistant:' }}{% generation %}
{%- if message.content %}{{ ' ' + message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ ' Call: ' + call.function | tojson }}{% endfor %}
{{- eos_token }}{% endgeneration %}
{%- else %}
{{- message.role | capitalize + ': ' + message.content + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A rendered conversation and the [start, end) characters of it that are trained.

    breaks: places within control tokens that were typed into a message; no token goes across (see `Tokenizer`).
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    breaks: tuple[int, ...] = ()


def load_template(source: str | None, tokenizer: Tokenizer) -> "Template":
    """The template of `source`: None (the tokenizer's own), "plain", or a path to a jinja file or to a
    tokenizer_config.json.

    A tokenizer without a template falls back to "plain", with a warning. Raises DataError: no such file, bad jinja,
    or a template that never renders the assistant.
    """
    if source is None and not tokenizer.chat_templates:
        logger.warning(
            "%s: no chat template in tokenizer_config.json or chat_template.jinja; using 'plain' "
            "(lines of roles, EOS after each answer)",
            tokenizer.name,
        )
        source = "plain"
    if source is None:
        name, named = f"chat template of {tokenizer.name}", tokenizer.chat_templates
    elif source == "plain":
        name, named = "chat template plain", {"default": PLAIN}
    else:
        name, named = f"chat template {source}", _read_templates(source)
    if "default" not in named:
        raise DataError(f"{name}: none of the named templates is called default; there are {', '.join(named)}")
    if source == "plain" and tokenizer.eos_id is None:
        raise DataError(f"{name}: {tokenizer.name} has no EOS token to end a turn with; give a template of its own")
    template = Template(named["default"], tokenizer, name, named.get("tool_use"))
    template.check()
    return template


def _read_templates(path) -> dict[str, str]:
    file = epath.Path(path)
    if not file.exists() or file.is_dir():
        raise DataError(f"{path}: no such chat template (a path to a .jinja file, or 'plain')")
    if not str(path).endswith(".json"):
        return {"default": file.read_text()}
    try:
        return named_templates(json.loads(file.read_text())["chat_template"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a JSON file with the key chat_template") from None


class Template:
    """A compiled chat template.

    source: its jinja text. tool_use: that of the template which stands in for it where tools are offered, as in
    `transformers`. fingerprint: sha256 of these and the special tokens.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "chat template", tool_use: str | None = None):
        self.source, self.name, self._tool_use = source, name, tool_use
        self._tokenizer = tokenizer
        self._special = tokenizer.special_tokens
        self._content_as_blocks = False  # templates of multimodal models read a list of blocks; see check()
        self._default = self._compile(source)
        self._with_tools = self._default if tool_use is None else self._compile(tool_use)
        control = tokenizer.control_tokens(source + (tool_use or ""))
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        decisive = [source, *([tool_use] if tool_use else []), self._special]
        self.fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def _compile(self, source: str) -> ChatJinja:
        try:
            return ChatJinja(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{self.name}: line {error.lineno}: {error.message}") from None

    def __reduce__(self):
        """Compiled jinja cannot be pickled: a copy is compiled anew from the source, and needs no `check`."""
        arguments = self.source, self._tokenizer, self.name, self._tool_use
        return Template, arguments, {"_content_as_blocks": self._content_as_blocks}

    @property
    def marks_generation(self) -> bool:
        """Whether it says by `{% generation %}` what the assistant writes."""
        return self._default.marks_generation

    def files(self) -> dict[str, bytes]:
        """What an export holds beside the tokenizer, so that the model is used as it was trained."""
        more = {f"{NAMED_TEMPLATES}/tool_use.jinja": self._tool_use.encode()} if self._tool_use else {}
        return {"chat_template.jinja": self.source.encode()} | more

    def render(self, messages, tools=None, add_generation_prompt: bool = False, trained_from: int = 0) -> Rendered:
        """The text of the messages and its trained spans: the assistant's turns of `messages[trained_from:]`.

        With the generation prompt, which asks for another turn, there are no spans. Raises ExampleFault:
        `template_refused` (the template's own complaint, such as roles that do not alternate), `template_rewrites`
        (a turn is left out), `control_token` (see `_typed`); DataError where a generation block cannot be traced.
        """
        text, blocks = self._text(messages, tools, add_generation_prompt)
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        render = lambda part, asking: self._text(part, tools, asking)[0]  # noqa: E731
        turns = Turns(render, messages, text, self._tokenizer, self.name)
        if add_generation_prompt:
            spans = []
        elif (self._with_tools if tools else self._default).marks_generation:
            spans = self._block_spans(text, blocks)
            if trained_from and assistant[0] < trained_from:
                begin = turns.begin(trained_from)
                spans = [(start, end) for start, end in spans if end > begin]
        else:
            spans = [turns.span(index) for index in assistant if index >= trained_from]
        kept = tuple((start, end) for start, end in spans if end > start)
        return Rendered(text, kept, self._typed(messages, tools, add_generation_prompt, text))

    def encode(self, messages, tokenizer: Tokenizer, tools=None, add_generation_prompt: bool = False) -> list[int]:
        """The ids of the messages, BOS once: what the model sees, as a prompt with `add_generation_prompt`."""
        text, _ = self._text(messages, tools, add_generation_prompt)
        breaks = self._typed(messages, tools, add_generation_prompt, text)
        return tokenizer.with_bos(tokenizer.encode_with_offsets(text, breaks)[0])

    def check_ends(self, messages, trained_from: int = 0) -> None:
        """Raises ExampleFault `ends_within`: a trained turn holds a token at which generation stops.

        In use the rest of that turn never comes; and what ends a turn, the template writes.
        """
        stops = [self._tokenizer.token(index) for index in self._tokenizer.stop_ids]
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index >= trained_from:
                found = next((stop for text in _strings(message) for stop in stops if stop in text), None)
                if found:
                    detail = f"message {index + 1}, the assistant's, holds {found}, at which generation stops"
                    raise ExampleFault("ends_within", f"{detail}; the template writes the end of a turn itself")

    def not_shown(self, messages, tools=None) -> str | None:
        """What the template, as `transformers` has it, passes over in silence: the tools, or the last turn's thoughts.

        Of earlier turns many templates forget the thoughts. Raises ExampleFault where the messages cannot be rendered.
        """
        thoughts = any(messages[-1].get(field) for field in REASONING)
        text = self._text(messages, tools, False)[0] if tools or thoughts else None
        if tools and self._text_if_accepted(messages, None) == text:
            return "the template does not show the model which tools it is offered"
        last = {key: value for key, value in messages[-1].items() if key not in REASONING}
        if thoughts and self._text_if_accepted([*messages[:-1], last], tools) == text:
            return "the template leaves out what the assistant thinks"
        return None

    def generation_prefix_fault(self, messages, tools=None, trained_from: int = 0) -> str | None:
        """None where what the model is given in use is the beginning of what it is trained on, else what differs.

        Compared in tokens, at every assistant turn of `messages[trained_from:]`: the messages before it with the
        generation prompt against all messages. Raises ExampleFault where the messages cannot be rendered.
        """
        whole = self.encode(messages, self._tokenizer, tools)
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < max(trained_from, 1):  # nothing asks for a first message
                continue
            try:
                given = self.encode(messages[:index], self._tokenizer, tools, add_generation_prompt=True)
            except ExampleFault as fault:
                return f"message {index + 1} cannot be asked for: {fault.detail}"
            if given != whole[: len(given)]:
                same = next(
                    (i for i, pair in enumerate(zip(given, whole, strict=False)) if len({*pair}) > 1), len(whole)
                )
                use, training = (
                    self._tokenizer.decode(ids[max(same - 2, 0) : same + 6], skip_special=False)
                    for ids in (given, whole)
                )
                return (
                    f"before message {index + 1}, the assistant's, the generation prompt gives {use!r} "
                    f"where the training text has {training!r}"
                )
        return None

    def check(self) -> None:
        """Raises DataError where the template does not write what the assistant says; warns where the prompt that it
        gives in use is not the beginning of what is trained."""
        dialogue = ({"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."})
        rendered = False
        for self._content_as_blocks in (False, True):
            try:
                text = self._text(dialogue, None, False)[0]
            except ExampleFault:  # it may want more than a dialogue of two turns: the examples will show
                continue
            rendered = True
            if "Answer." in text:
                if not text.startswith(self._text_if_accepted(dialogue[:1], None, True) or ""):
                    logger.warning("%s: its generation prompt is not the beginning of the text trained on", self.name)
                return
        self._content_as_blocks = False
        if rendered:
            raise DataError(f"{self.name}: never renders what the assistant says")

    def _text(self, messages, tools, add_generation_prompt: bool) -> tuple[str, list[tuple[int, str]]]:
        """The text, and (start, words) of each generation block."""
        try:
            return self._rendered([self._prepared(message) for message in messages], tools, add_generation_prompt)
        except jinja2.TemplateError as error:
            detail = " ".join(str(error.message or error).split())
            raise ExampleFault("template_refused", f"{self.name}: {detail}") from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # a slip of the template on this example
            detail = " ".join(str(error).split())
            raise ExampleFault("template_refused", f"{self.name}: {type(error).__name__}: {detail}") from None

    def _rendered(self, messages: list[dict], tools, add_generation_prompt: bool) -> tuple[str, list[tuple[int, str]]]:
        compiled = self._with_tools if tools else self._default
        variables = {
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special,
        }
        try:
            return compiled.render(messages=messages, **variables)
        except TypeError:
            # Some templates join arguments to text as they are, and so want them as a JSON string.
            if not any(message.get("tool_calls") for message in messages):
                raise
            return compiled.render(messages=[_arguments_as_text(message) for message in messages], **variables)

    def _text_if_accepted(self, messages, tools, add_generation_prompt: bool = False) -> str | None:
        """None where the template refuses the messages (an empty list, say)."""
        try:
            return self._text(messages, tools, add_generation_prompt)[0]
        except ExampleFault:
            return None

    def _prepared(self, message: dict) -> dict:
        """A message as the template reads it. Thoughts go by several names; `transformers` fills them in likewise."""
        thoughts = next((message[field] for field in REASONING if message.get(field) is not None), None)
        if thoughts is not None:
            message = {"thinking": thoughts, **message, "reasoning_content": thoughts}
        if self._content_as_blocks:
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        return message

    def _typed(self, messages, tools, add_generation_prompt: bool, text: str) -> tuple[int, ...]:
        """Places within control tokens of `text` that come from a message or a tool, and not from the template.

        Found by rendering again with a mark in each. What the assistant says is left as it is: models do write control
        tokens, and what is trained is its author's (`check_ends` looks for ends of turns). Raises ExampleFault where
        the template itself reads the token, so that it renders otherwise without.
        """
        seen = [message for message in messages if message["role"] != "assistant"]
        found = {match.group() for string in _strings([seen, tools]) for match in self._control.finditer(string)}
        if not found:
            return ()
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
        marked = [m if m["role"] == "assistant" else {**self._marked(m, mark), "role": m["role"]} for m in messages]
        parts = self._text(marked, self._marked(tools, mark), add_generation_prompt)[0].split(mark)
        if "".join(parts) != text:
            tokens = ", ".join(sorted(found))
            raise ExampleFault("control_token", f"{self.name}: reads the control token {tokens} in a message")
        return tuple(itertools.accumulate(map(len, parts[:-1])))

    def _marked(self, value, mark: str):
        """The value with the mark behind the first character of every control token, overlapping ones too."""
        if isinstance(value, dict):
            return {key: self._marked(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item, mark) for item in value]
        if not isinstance(value, str):
            return value
        pieces, done = [], 0
        while match := self._control.search(value, done):
            pieces.append(value[done : match.start() + 1])
            done = match.start() + 1
        return mark.join([*pieces, value[done:]])

    def _block_spans(self, text: str, blocks: list[tuple[int, str]]) -> list[tuple[int, int]]:
        for start, words in blocks:
            if text[start : start + len(words)] != words:
                raise DataError(f"{self.name}: a generation block inside a macro or a filter cannot be traced")
        return [(start, start + len(words)) for start, words in blocks]


def _arguments_as_text(message: dict) -> dict:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in calls]
    changed = [c | {"function": c["function"] | {"arguments": text}} for c, text in zip(calls, texts, strict=True)]
    return message | {"tool_calls": changed}


def _strings(value):
    """All strings in nested dicts and lists, but for keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
