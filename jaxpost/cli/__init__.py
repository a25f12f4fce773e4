"""The command line: `jaxpost VERB --flag=value`. Each verb is one short file here with `run(arguments)`.

A UserError is printed as one line and ends the program with code 2; nothing else is caught. With main.py these files
are the only code that reads flags.
"""

import argparse
import importlib
import sys

from jaxpost import config, schema
from jaxpost.errors import CheckpointError, ConfigError, UserError

VERBS = {
    "train": "runs the stage that a config describes",
    "check": "shows what a config's data becomes, without training",
    "plan": "tells what a config needs on hardware that is not here: memory, time, wires",
    "data": "names file, line and transform of every document in a step's rows",
    "teach": "keeps what a teacher says of a config's data, to distill from",
    "chat": "talks to a checkpoint",
    "generate": "draws completions for a file of prompts",
    "export": "writes a run's weights in Hugging Face layout, or its adapters in PEFT's",
    "merge": "makes one model of several (linear, slerp, ties, dare)",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are the one line that all user errors are."""

    def __init__(self, verb: str, **kwargs):
        super().__init__(
            prog=f"jaxpost {verb}",
            description=f"{VERBS[verb]}.".capitalize(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str):
        raise ConfigError(message)


def console() -> None:
    """The console script `jaxpost`."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Runs one verb; returns the exit code: 0, 2 for a UserError, or what the verb says."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: jaxpost VERB --help\n")
        for verb, summary in VERBS.items():
            print(f"  {verb:9}{summary}")
        return 0 if arguments else 2
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise ConfigError(f"{verb}: unknown verb; there are {', '.join(VERBS)}")
        return importlib.import_module(f"jaxpost.cli.{verb}").run(rest) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def read_config(verb: str, arguments: list[str]) -> config.Config:
    """`--config=NAME --config.loss.beta=0.2 ...` -> the resolved config."""
    return parse_config(config_parser(verb), arguments)[0]


def config_parser(verb: str) -> Parser:
    """A parser of `--config` and its keys, to which a verb may add flags of its own."""
    parser = Parser(verb, epilog=key_table())
    parser.add_argument("--config", metavar="FILE", help="config file, or the name of one that ships (dpo, sft)")
    parser.add_argument("--config.KEY", metavar="VALUE", help="sets one key of it; repeatable")
    return parser


def parse_config(parser: Parser, arguments: list[str]) -> tuple[config.Config, argparse.Namespace]:
    """(the resolved config, all flags)."""
    known, overrides = parser.parse_known_args(arguments)
    if known.config is None:
        raise ConfigError("--config: missing; give a config file, as in --config=configs/dpo.py")
    values = config.load(known.config)
    for argument in overrides:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config."):
            raise ConfigError(f"{argument}: unknown argument; keys are set by --config.KEY=VALUE")
        if not equals:
            raise ConfigError(f"{name}: no value; write --config.{name}=VALUE")
        config.override(values, name, text)
    return config.resolve(values), known


def new_folder(flag: str, path: str):
    """The folder that a flag names, to be written. Raises CheckpointError where something stands there."""
    from etils import epath

    target = epath.Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{flag}: {target} exists and is not an empty folder; give another")
    return target


def key_table() -> str:
    """Every key with default, meaning and range, for --help."""
    lines = [f"  {name:24} {default:16} {meaning}" for name, default, meaning in schema.describe(config.Config)]
    return "keys (with default, meaning and range):\n" + "\n".join(lines)
