"""Chat templates: messages to text, with the characters that are trained.

The jinja2 set-up is that of `transformers`, so that the text is what the model meets in use elsewhere. Trained are the
assistant's turns with their end-of-turn token: by `{% generation %}` blocks where the template has them, else by
differences of renderings (`_turn_span`).
"""

import dataclasses
import datetime
import hashlib
import json
import logging

import jinja2
import jinja2.ext
import jinja2.sandbox
from etils import epath

from jaxpost.data.formats import ExampleFault
from jaxpost.data.tokenizers import Tokenizer
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
    """A rendered conversation and the [start, end) characters of it that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]


def load_template(source: str | None, tokenizer: Tokenizer) -> "Template":
    """The template of `source`: None (the tokenizer's own), "plain", or a path to a jinja file or to a
    tokenizer_config.json.

    A tokenizer without a template falls back to "plain", with a warning. Raises DataError: no such file, bad jinja,
    or a template that never renders the assistant.
    """
    if source is None and tokenizer.chat_template is None:
        logger.warning(
            "%s: no chat template in tokenizer_config.json or chat_template.jinja; using 'plain' "
            "(lines of roles, EOS after each answer)",
            tokenizer.name,
        )
        source = "plain"
    if source is None:
        name, text = f"chat template of {tokenizer.name}", tokenizer.chat_template
    elif source == "plain":
        name, text = "chat template plain", PLAIN
    else:
        name, text = f"chat template {source}", _read_template(source)
    if "eos_token" in text and tokenizer.eos_id is None and source == "plain":
        raise DataError(f"{name}: {tokenizer.name} has no EOS token to end a turn with; give a template of its own")
    template = Template(text, tokenizer, name)
    template.check()
    return template


def _read_template(path) -> str:
    file = epath.Path(path)
    if not file.exists() or file.is_dir():
        raise DataError(f"{path}: no such chat template (a path to a .jinja file, or 'plain')")
    text = file.read_text()
    if not str(path).endswith(".json"):
        return text
    try:
        return json.loads(text)["chat_template"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a JSON file with the key chat_template") from None


class Template:
    """A compiled chat template. `source` is its jinja text, `fingerprint` the sha256 of it and the special tokens."""

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "chat template"):
        self.source, self.name = source, name
        self._tokenizer = tokenizer
        self._special = tokenizer.special_tokens
        self._whole_tokens = tokenizer.whole_tokens
        self._content_as_blocks = False  # templates of multimodal models read a list of blocks; see check()
        self._environment = _environment()
        self._blocks = self._environment.extensions[GenerationBlocks.identifier]
        try:
            self._template = self._environment.from_string(source)
            self.marks_generation = _uses_generation(self._environment, source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{name}: line {error.lineno}: {error.message}") from None
        self.fingerprint = hashlib.sha256(json.dumps([source, self._special], sort_keys=True).encode()).hexdigest()

    def __reduce__(self):
        """Compiled jinja cannot be pickled: a copy is compiled anew from the source, and needs no `check`."""
        return Template, (self.source, self._tokenizer, self.name), {"_content_as_blocks": self._content_as_blocks}

    def files(self) -> dict[str, bytes]:
        """What an export holds beside the tokenizer, so that the model is used as it was trained."""
        return {"chat_template.jinja": self.source.encode()}

    def render(self, messages, tools=None, add_generation_prompt: bool = False, trained_from: int = 0) -> Rendered:
        """The text of the messages and its trained spans: the assistant's turns of `messages[trained_from:]`.

        With the generation prompt, which asks for another turn, there are no spans. Raises ExampleFault:
        `template_refused` (the template's own complaint, such as roles that do not alternate), `template_rewrites`
        (a turn is left out); DataError where a generation block cannot be traced.
        """
        text, blocks = self._text(messages, tools, add_generation_prompt)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if add_generation_prompt:
            spans = []
        elif self.marks_generation:
            spans = self._block_spans(text, blocks)
            if trained_from and turns[0] < trained_from:
                begin, _ = self._content_span(messages, tools, trained_from, text)
                spans = [(start, end) for start, end in spans if end > begin]
        else:
            spans = [self._turn_span(messages, tools, index, text) for index in turns if index >= trained_from]
        return Rendered(text, tuple((start, end) for start, end in spans if end > start))

    def encode(self, messages, tokenizer: Tokenizer, tools=None, add_generation_prompt: bool = False) -> list[int]:
        """The ids of the messages, BOS once: what the model sees, as a prompt with `add_generation_prompt`."""
        return tokenizer.with_bos(tokenizer.encode(self._text(messages, tools, add_generation_prompt)[0]))

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
                if not text.startswith(self._prompt(dialogue[:1], None) or ""):
                    logger.warning("%s: its generation prompt is not the beginning of the text trained on", self.name)
                return
        self._content_as_blocks = False
        if rendered:
            raise DataError(f"{self.name}: never renders what the assistant says")

    def _text(self, messages, tools, add_generation_prompt: bool) -> tuple[str, list[tuple[int, str]]]:
        """The text, and (start, words) of each generation block."""
        written = self._blocks.begin()
        try:
            stream = self._template.generate(
                messages=[self._as_blocks(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
            for piece in stream:
                written.append(piece)
        except jinja2.TemplateError as error:
            detail = " ".join(str(error.message or error).split())
            raise ExampleFault("template_refused", f"{self.name}: {detail}") from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # a slip of the template on this example
            detail = " ".join(str(error).split())
            raise ExampleFault("template_refused", f"{self.name}: {type(error).__name__}: {detail}") from None
        return "".join(written), self._blocks.found

    def _block_spans(self, text: str, blocks: list[tuple[int, str]]) -> list[tuple[int, int]]:
        for start, words in blocks:
            if text[start : start + len(words)] != words:
                raise DataError(f"{self.name}: a generation block inside a macro or a filter cannot be traced")
        return [(start, start + len(words)) for start, words in blocks]

    def _as_blocks(self, message: dict) -> dict:
        if not self._content_as_blocks:
            return message
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    def _turn_span(self, messages, tools, index: int, text: str) -> tuple[int, int]:
        """Where assistant turn `index` stands in `text`: what it adds to the prompt that asks for it.

        That is render(through the turn) less render(before it, with the generation prompt), as far as both are
        beginnings of the text; where the template writes a turn otherwise once others follow, what depends on the
        turn's content. White space that the template writes behind a closing special token is never sampled, so it is
        not trained.
        """
        before = self._prompt(messages[:index], tools)
        through = text if index == len(messages) - 1 else self._text(messages[: index + 1], tools, False)[0]
        asked = before is not None and text.startswith(before)
        if asked and text.startswith(through):
            start, end = len(before), len(through)
        else:
            start, end = self._content_span(messages, tools, index, text)
            start = len(before) if asked else start
            own_end = self._content_span(messages[: index + 1], tools, index, through)[1]
            closing = _common(text[end:], through[own_end:])
            # The common part may end within the next special token ("<|" of two of them): keep whole tokens.
            ends = [stop for _, stop in self._tokenizer.encode_with_offsets(text[end:])[1]]
            end += max((stop for stop in ends if stop <= closing), default=0)
        closed = text[:end].rstrip()
        return start, len(closed) if closed.endswith(self._whole_tokens) else end

    def _prompt(self, messages, tools) -> str | None:
        """The messages with the generation prompt; None where the template refuses them (an empty list, say)."""
        try:
            return self._text(messages, tools, True)[0]
        except ExampleFault:
            return None

    def _content_span(self, messages, tools, index: int, text: str) -> tuple[int, int]:
        """The characters of `text` that depend on the content of message `index`."""
        other = {**messages[index], "content": "\ue000"}  # private use: no content begins or ends with it
        changed = self._text((*messages[:index], other, *messages[index + 1 :]), tools, False)[0]
        if changed == text:
            raise ExampleFault("template_rewrites", f"{self.name}: leaves out message {index + 1}, the assistant's")
        start = _common(text, changed)
        return start, len(text) - _common(text[start:][::-1], changed[start:][::-1])


class GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: notes where in the stream of pieces each block begins."""

    tags = frozenset({"generation"})

    def begin(self) -> list[str]:
        """Starts a rendering; the caller appends every piece of the stream to the list that is returned."""
        self.found: list[tuple[int, str]] = []
        self._written: list[str] = []
        return self._written

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller) -> str:
        words = caller()
        self.found.append((sum(map(len, self._written)), words))
        return words


def _common(one: str, other: str) -> int:
    """How many characters the two have in common at the beginning; by bisection, which leaves the work to memcmp."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _uses_generation(environment, source: str) -> bool:
    nodes = environment.parse(source).find_all(jinja2.nodes.ExtensionAttribute)
    return any(node.identifier == GenerationBlocks.identifier for node in nodes)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """As `transformers` sets it up; tojson must not escape HTML as jinja's own does."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)
