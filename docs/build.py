"""Makes what is made in this folder: `python docs/build.py` (`make docs`).

keys.md is every key of `jaxpost.keys`, api.md the public functions of the rooms that users import, read from their
sources, and the notebooks lose what running them left behind. tests/docs holds the committed files to it.
"""

import ast
import json
import pathlib
import sys
import types
import typing
from typing import Literal

DOCS = pathlib.Path(__file__).parent
PACKAGE = DOCS.parent / "jaxpost"
sys.path.insert(0, str(DOCS.parent))  # as a script: the package that lies beside, not an installed one

from jaxpost import schema  # noqa: E402
from jaxpost.keys import Config  # noqa: E402

WORDS = {int: "integer", float: "number", bool: "True or False", str: "text"}
# What api.md shows: file -> the names of it, None for all public ones.
SHOWN = {
    "api.py": None,
    "train/run.py": ("LoadedModel", "Run"),
    "train/scores.py": ("Scores", "joined"),
    "plan/planner.py": ("plan", "TopologyPlan", "ProgramPlan"),
    "types.py": None,
    **{f"{room}/{path.name}": None for room in ("losses", "rl") for path in sorted((PACKAGE / room).glob("[a-z]*.py"))},
}
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def pages() -> dict[pathlib.Path, str]:
    """{file: what it should hold} of everything that is made."""
    made = {DOCS / "keys.md": keys_page(), DOCS / "api.md": api_page()}
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        made[path] = stripped(path.read_text(encoding="utf-8"))
    return made


# --- keys -------------------------------------------------------------------------------------------------------------


def keys_page() -> str:
    """Every key with type, default, meaning and range, a table a section."""
    fields, sections = schema.keys(Config), {}
    for name, default, meaning in schema.describe(Config):
        section, _, _ = name.rpartition(".")
        kind = type_word(fields[name].type) if name in fields else "any scalar"
        sections.setdefault(section, []).append((f"`{name}`", kind, f"`{default}`" if default else "", meaning))
    lines = [
        "# Keys",
        "",
        "Made by `docs/build.py` from `jaxpost/keys.py`; `jaxpost train --help` prints the same. Ranges and choices",
        "stand in brackets; `required` has no default. Set a key by `--config.KEY=VALUE` or in a config file.",
    ]
    for section, rows in sorted(sections.items(), key=lambda item: item[0] != ""):
        lines += ["", f"## {section or 'top level'}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def type_word(annotation) -> str:
    """A key's annotation in words."""
    options = typing.get_args(annotation)
    if annotation == schema.Sources:
        return "sources"
    if types.NoneType in options:
        (inner,) = (option for option in options if option is not types.NoneType)
        return f"{type_word(inner)} or None"
    if typing.get_origin(annotation) is Literal:
        return "choice"
    if typing.get_origin(annotation) is tuple:
        return (
            f"list of {type_word(options[0])}" if options[-1] is Ellipsis else f"{len(options)} x {WORDS[options[0]]}"
        )
    return WORDS[annotation]


# --- api --------------------------------------------------------------------------------------------------------------


def api_page() -> str:
    """Signatures and docstrings of `SHOWN`, as their sources have them."""
    contents, body = [], []
    for file, names in SHOWN.items():
        source = (PACKAGE / file).read_text(encoding="utf-8")
        tree = ast.parse(source)
        module = "jaxpost." + file.removesuffix(".py").replace("/", ".")
        found = [node for node in tree.body if public(node) and (names is None or node.name in names)]
        contents.append(f"- [{module}](#{module.replace('.', '')}): {', '.join(node.name for node in found)}")
        body += ["", f"## {module}", "", f"[jaxpost/{file}](../jaxpost/{file})"]
        if names is None:
            body += ["", *fenced(ast.get_docstring(tree).splitlines(), "text")]
        for node in found:
            body += definition(node, source.splitlines())
    lines = [
        "# API",
        "",
        "Made by `docs/build.py` from the sources' docstrings. `import jaxpost` gives `run`, `load` and `get_config`;",
        "`jaxpost.losses` and `jaxpost.rl` need jax alone. Dimension letters stand at the top of `jaxpost.types`.",
        "",
        *contents,
    ]
    return "\n".join([*lines, *body]) + "\n"


def public(node) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")


def definition(node, source: list[str], heading: str = "###", prefix: str = "") -> list[str]:
    """Heading, signature and docstring; of a class its fields and public methods too."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    documented = ast.get_docstring(node) is not None
    last = node.body[0].end_lineno if documented else node.body[0].lineno - 1
    if isinstance(node, ast.ClassDef):  # with the blank line and the comments between its fields
        last = max([last, *(field.end_lineno for field in node.body if isinstance(field, ast.AnnAssign))])
    shown = source[first:last]
    indent = len(shown[0]) - len(shown[0].lstrip())
    lines = ["", f"{heading} {prefix}{node.name}", "", *fenced([line[indent:] for line in shown], "python")]
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and public(method):
            lines += definition(method, source, "####", f"{node.name}.")
    return lines


def fenced(lines: list[str], language: str) -> list[str]:
    return [f"```{language}", *lines, "```"]


# --- notebooks --------------------------------------------------------------------------------------------------------


def stripped(text: str) -> str:
    """A notebook without outputs, counts and an editor's metadata; cells are named by their place."""
    notebook = json.loads(text)
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        tags = cell.get("metadata", {}).get("tags")
        kept = {"cell_type": cell["cell_type"], "id": f"cell-{number}", "metadata": {"tags": tags} if tags else {}}
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        cells.append({**kept, "source": source.splitlines(keepends=True)})
    made = {"cells": cells, "metadata": NOTEBOOK_METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main()
