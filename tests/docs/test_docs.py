"""The documentation: what is made is as it would be made, keys and commands it names exist, links lead somewhere."""

import importlib.util
import inspect
import json
import pathlib
import re
import shlex

import pytest

from jaxpost import cli, schema
from jaxpost.data import formats
from jaxpost.keys import Config
from jaxpost.losses import distill, policy, preference, reward, sft, unpaired
from jaxpost.types import Origin

REPOSITORY = pathlib.Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
WRITTEN = [
    REPOSITORY / "README.md",
    *(DOCS / f"{name}.md" for name in ("README", "migration", "ppo", "servers")),
    *GUIDES,
]
SECTIONS = {name.partition(".")[0] for name in schema.keys(Config) if "." in name}
FILES = {"json", "jsonl", "png", "py", "md", "html"}  # `reward.png` is no key


def built() -> dict[pathlib.Path, str]:
    """What `python docs/build.py` would write."""
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def hyperparameters() -> set[str]:
    """`loss.NAME` of every keyword argument of every loss that ships."""
    losses = [loss for room in (distill, policy, preference, reward, sft, unpaired) for loss in room.LOSSES.values()]
    found = [p for loss in losses for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {f"loss.{parameter.name}" for parameter in found}


def named_keys(text: str) -> set[str]:
    """What stands in backticks in the form of a key: `section.name`, perhaps with a value."""
    found = re.findall(r"`(\w+(?:\.\w+)+)(?:=[^`]*)?`", text)
    return {name for name in found if name.partition(".")[0] in SECTIONS and name.rpartition(".")[2] not in FILES}


def unknown_keys(text: str) -> set[str]:
    return named_keys(text) - schema.keys(Config).keys() - hyperparameters() - {"data.quality"}


def commands(text: str) -> list[list[str]]:
    """The lines of code blocks that call jaxpost, as arguments; comments and continued lines are understood."""
    blocks = re.findall(r"^```(?:bash|console)\n(.*?)^```", text, flags=re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words[1:] for words in split if words[:1] == ["jaxpost"]]


def test_made_pages_are_as_they_would_be_made():
    """Run `python docs/build.py` (or `make docs`) where this fails."""
    for path, text in built().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python docs/build.py"


def test_the_page_of_keys_has_every_key():
    page = (DOCS / "keys.md").read_text()
    assert all(f"| `{name}` |" in page for name in schema.keys(Config))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_keys_and_links(path):
    text = path.read_text(encoding="utf-8")
    assert unknown_keys(text) == set()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_examples_of_records_have_a_format(path):
    for block in re.findall(r"^```json\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.S | re.M):
        for number, line in enumerate(block.splitlines(), start=1):
            assert formats.parse(json.loads(line), Origin(path.name, number)).completions


def test_a_key_that_does_not_exist_is_found():
    text = "Set `batch.rows_per_step=8`, `loss.beta`, `run.step`, `reward.png`, `loss.betta`, `losses.kl`."
    assert unknown_keys(text) == {"run.step", "loss.betta"}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_commands_are_accepted(path):
    """Verbs exist, and every command with a --config resolves: its keys, their values, and all of them together."""
    for verb, *arguments in commands(path.read_text(encoding="utf-8")):
        assert verb in cli.VERBS, verb
        if verb in ("train", "check"):
            parser = cli.config_parser(verb)
            for flag in ("--examples", "--out", "--kind", "--strict"):
                parser.add_argument(flag)
            cli.parse_config(parser, arguments)
