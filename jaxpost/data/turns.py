"""Where the assistant's turns stand in a rendered conversation, for templates that do not mark them.

What a turn is, the template alone knows, so it is found by differences of renderings.
"""

from collections.abc import Callable, Sequence

from jaxpost.data.messages import ExampleFault
from jaxpost.data.tokenizers import Tokenizer

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of what the assistant thinks, in order
MARK = "\ue000"  # for private use: no text begins or ends with it
LEAST = 16  # characters by which words are found again
CONTEXT = 64  # characters that tell where the token before them ends


class Turns:
    """The turns of one conversation.

    render(messages, add_generation_prompt) gives the text or raises ExampleFault; `text` is that of all messages.
    """

    def __init__(self, render: Callable, messages: Sequence[dict], text: str, tokenizer: Tokenizer, name: str):
        self._render, self._messages, self._text = render, tuple(messages), text
        self._tokenizer, self._name = tokenizer, name

    def span(self, index: int) -> tuple[int, int]:
        """[start, end) of assistant turn `index`: what it adds to the prompt that asks for it.

        That is the text through the turn less the text before it with the generation prompt, as far as both are
        beginnings of the whole; else see `_rewritten`. White space that the template writes behind a closing special
        token is never sampled, so it is not trained. Raises ExampleFault (template_rewrites) where the turn is left
        out, or other turns stand within it.
        """
        before = self._render_if_accepted(self._messages[:index], True)
        last = index == len(self._messages) - 1
        through = self._text if last else self._render(self._messages[: index + 1], False)
        if before is not None and self._text.startswith(before) and self._text.startswith(through):
            start, end = len(before), len(through)
        else:
            start, end = self._rewritten(index, before, through)
        closed = self._text[:end].rstrip()
        return start, len(closed) if closed.endswith(self._tokenizer.whole_tokens) else end

    def begin(self, index: int) -> int:
        """Where the words of message `index` begin."""
        return self._words(self._messages, index, self._text)[0]

    def _rewritten(self, index: int, before: str | None, through: str) -> tuple[int, int]:
        """A turn that the template writes otherwise once others follow, or behind another beginning than it asks with:
        what depends on its words, with the header's and the closing tokens that stand around them both times."""
        text = self._text
        floor, limit = self._neighbours(index)
        start, end = self._words(self._messages, index, text)
        if before is not None and text.startswith(before):
            start = len(before)
        elif before is not None:
            # Of the header that asks, what is there: the words may begin alike with other words, as with a token that
            # opens a channel.
            unasked = self._render_if_accepted(self._messages[:index], False) or before
            header, same = before[len(unasked) :], _common(text, before)
            found = text.rfind(header, floor, start) if header else -1
            if found >= 0:
                start = found + len(header)
            elif same >= len(unasked):
                start = min(start, same)
        own_start, own_end = self._words(self._messages[: index + 1], index, through)
        # What follows may depend on this turn too, as does the header of a result on the call's name.
        end = min(end, _after_longest_tail(text, start, limit, through[own_start:own_end]))
        # What follows thoughts is what stays; white space may change.
        said = _squeezed(self._messages[index]["content"].rpartition("</think>")[2])[-LEAST:]
        elsewhere = said not in _squeezed(text[start:end]) and said in _squeezed(text[end:])
        if not floor <= start <= end <= limit or elsewhere:
            detail = f"mixes message {index + 1}, the assistant's, with what others say"
            raise ExampleFault("template_rewrites", f"{self._name}: {detail}")
        closing = _common(text[end:], through[own_end:])
        # The common part may end within the next special token ("<|" of two of them): keep whole tokens.
        ends = [stop for _, stop in self._tokenizer.encode_with_offsets(text[end : end + closing + CONTEXT])[1]]
        return start, end + max((stop for stop in ends if stop <= closing), default=0)

    def _neighbours(self, index: int) -> tuple[int, int]:
        """Between which characters the turn stands: the end of what others say before it, the start of it after."""
        others = [i for i, message in enumerate(self._messages) if message["role"] != "assistant"]
        before = [i for i in others if i < index][-1:]
        after = [i for i in others if i > index][:1]
        floor = max((self._words(self._messages, i, self._text, silent=True)[1] for i in before), default=0)
        limit = min(
            (self._words(self._messages, i, self._text, silent=True)[0] for i in after), default=len(self._text)
        )
        return floor, limit if after and limit else len(self._text)

    def _words(self, messages: Sequence[dict], index: int, text: str, silent: bool = False) -> tuple[int, int]:
        """The characters of `text` that depend on what message `index` says: its content, calls and thoughts.

        Where none do, (0, 0) if silent, else ExampleFault.
        """
        kept = {key: value for key, value in messages[index].items() if key not in ("tool_calls", *REASONING)}
        variants = kept | {"content": MARK}, _other_words(messages[index])  # a result may have to follow a call
        changed = (
            self._render_if_accepted((*messages[:index], new, *messages[index + 1 :]), False) for new in variants
        )
        other = next((text for text in changed if text is not None), text)
        if other == text:
            if silent:
                return 0, 0
            raise ExampleFault("template_rewrites", f"{self._name}: leaves out message {index + 1}, the assistant's")
        start = _common(text, other)
        return start, len(text) - _common(text[start:][::-1], other[start:][::-1])

    def _render_if_accepted(self, messages: Sequence[dict], add_generation_prompt: bool) -> str | None:
        """None where the template refuses the messages (an empty list, say)."""
        try:
            return self._render(messages, add_generation_prompt)
        except ExampleFault:
            return None


def _other_words(message: dict) -> dict:
    """The message with the same parts, but other words in each."""
    other = {key: MARK if key in REASONING else value for key, value in message.items()}
    if message.get("content") or not message.get("tool_calls"):
        other["content"] = MARK
    if message.get("tool_calls"):
        function = {"name": MARK, "arguments": {MARK: MARK}}
        other["tool_calls"] = [call | {"function": call["function"] | function} for call in message["tool_calls"]]
    return other


def _squeezed(text: str) -> str:
    return "".join(text.split())


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


def _after_longest_tail(text: str, start: int, end: int, words: str) -> int:
    """The place behind the longest tail of `words` in `text[start:end]`; `len(text)` where it is too short to tell."""
    low, high = 0, min(end - start, len(words))
    while low < high:
        middle = (low + high + 1) // 2
        if text.find(words[-middle:], start, end) >= 0:
            low = middle
        else:
            high = middle - 1
    enough = 0 < min(LEAST, len(words)) <= low
    return text.find(words[-low:], start, end) + low if enough else len(text)
