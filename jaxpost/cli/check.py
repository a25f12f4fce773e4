"""`jaxpost check --config=dpo`: what a config's data becomes, and what is wrong with it. Reads no weights."""

import argparse
import os

from rich.console import Console
from rich.table import Table

from jaxpost import cli
from jaxpost.errors import ConfigError
from jaxpost.keys import STAGES_OF_PAIRS

# The kind of documents that a stage trains on.
KIND = {"sft": "sft", "distill": "sft", "kto": "unpaired", "reward": "ranking"} | dict.fromkeys(
    STAGES_OF_PAIRS, "preference"
)


def kind_of(config) -> str:
    """The kind of documents that the config's stage trains on."""
    return "stepwise" if (config.stage, config.loss.name) == ("reward", ("process",)) else KIND[config.stage]


def run(arguments: list[str]) -> None:
    parser = cli.config_parser("check")
    parser.add_argument("--examples", type=_count, default=3, metavar="N", help="examples printed token by token (3)")
    parser.add_argument("--out", metavar="DIR", help="folder for lengths.png and what data.quality leaves out")
    parser.add_argument("--kind", help="kind of data, for one that no stage trains on yet (ranking, unpaired, prompt)")
    strict = "false: what is refused is only told, as if data.allow named all of it"
    parser.add_argument("--strict", choices=("true", "false"), default="true", help=strict)
    config, flags = cli.parse_config(parser, arguments)
    from jaxpost.data import formats, preflight  # after the config is found good: setup loads jax
    from jaxpost.train.setup import open_data, open_model, preflight_findings

    kind, kinds = flags.kind or kind_of(config), {form.kind: None for form in formats.FORMATS.values()}
    if not any(form.fits(kind) for form in formats.FORMATS.values()):
        raise ConfigError(f"--kind: no format holds {kind!r}; there are {', '.join(kinds)}")
    console = Console()
    model = open_model(config, mesh=None)
    datasets = []
    data = open_data(config, model, kind, inspect=datasets.append)
    report(config, model, data, preflight.duplicates(datasets[0].documents), console, flags)
    findings = [finding for dataset in datasets for finding in preflight_findings(config, model, dataset)]
    allow = config.data.allow if flags.strict == "true" else preflight.REFUSALS
    for finding in preflight.refuse(findings, allow):
        console.print(f"warning: {finding}", markup=False, highlight=False, soft_wrap=True)
    verdict = f"{len(findings)} warnings" if findings else "nothing wrong found"
    console.print(f"{len(data.train):,} documents to train on: {verdict}", highlight=False)


def report(config, model, data, repeated, console: Console, flags) -> None:
    """Examples, a packed row, and what the documents measure. repeated: duplicates, held-out examples among them."""
    from jaxpost.data import preflight, quality
    from jaxpost.data.loader import Loader, row_statistics
    from jaxpost.train.report import draw_lengths

    batch = config.batch
    shape = {name: getattr(batch, name) for name in ("rows_per_step", "tokens_per_row", "documents_per_row")}
    loader = Loader(data.train, **shape, branches=data.branches, seed=config.run.seed)
    packs = len(data.train[0].completions) > 0  # questions without an answer are never rows of a step
    if flags.examples:
        preflight.show_examples(data.train, model.tokenizer, flags.examples, console)
    if flags.examples and packs:
        preflight.show_row(loader, model.tokenizer, console)
    lengths = preflight.measure(data.train)
    console.print(data.report.table())
    table = Table("tokens", title="lengths", title_justify="left")
    for percentile in ("50 %", "90 %", "99 %", "max"):
        table.add_column(percentile, justify="right")
    for name, values in lengths.rows():
        table.add_row(name, *(f"{value:,}" for value in values))
    console.print(table)
    table = Table(title="rows", title_justify="left", show_header=False)
    if packs:
        packed = row_statistics(loader)
        table.add_row("padding", f"{100 * packed['padding_share']:.1f} % of {batch.tokens_per_row:,} tokens a row")
        table.add_row("documents a row", f"{packed['documents_per_row']:.1f}")
    places = ", ".join(f"{short(one)} = {short(other)}" for one, other in repeated[:3])
    more = ", ..." * (len(repeated) > 3)
    table.add_row("duplicates", f"{len(repeated):,}" + (f" ({places}{more})" if places else ""))
    console.print(table)
    if flags.out is not None:
        path = draw_lengths(config, model, lengths, flags.out)
        console.print(f"lengths drawn in {path}", highlight=False, markup=False, soft_wrap=True)
    if flags.out is not None and config.data.quality.on:
        path = os.path.join(flags.out, quality.NAME)
        quality.write(data.removed, path)
        console.print(f"what data.quality leaves out: {path}", markup=False, highlight=False, soft_wrap=True)


def short(origin) -> str:
    """File and line without the folder."""
    return str(origin).rpartition("/")[2]


def _count(text: str) -> int:
    try:
        if (value := int(text)) >= 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
