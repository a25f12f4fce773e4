"""Jinja as `transformers` sets it up for chat templates, and a trace of `{% generation %}` blocks."""

import datetime
import json

import jinja2
import jinja2.ext
import jinja2.sandbox


class ChatJinja:
    """Compiled jinja of a chat template. Raises jinja2.TemplateSyntaxError. Not for several threads at once.

    marks_generation: whether it says by blocks what the assistant writes.
    """

    def __init__(self, source: str):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json  # jinja's own escapes HTML
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._blocks = environment.extensions[_GenerationBlocks.identifier]
        nodes = environment.parse(source).find_all(jinja2.nodes.ExtensionAttribute)
        self.marks_generation = any(node.identifier == _GenerationBlocks.identifier for node in nodes)

    def render(self, **variables) -> tuple[str, list[tuple[int, str]]]:
        """The text, and (start, words) of each generation block."""
        written = self._blocks.begin()
        for piece in self._template.generate(**variables):
            written.append(piece)
        return "".join(written), self._blocks.found


class _GenerationBlocks(jinja2.ext.Extension):
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


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)
