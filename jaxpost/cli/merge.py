"""`jaxpost merge --method=ties --base=BASE --model=A --model=B --density=0.2 --to=OUT`: several checkpoints as one."""

import argparse

from rich.console import Console
from rich.progress import track

from jaxpost import cli
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models.merging import Recipe

ABOUT = """methods (theta: a model's weights, tau = theta - base: its task vector; all tensor by tensor):
  linear       sum w theta / sum w
  slerp        the share w2 / (w1 + w2) of the way between two models, along the great circle
  ties         base + scale * mean, by weight, of the taus' largest entries that have the sign of the larger mass
  dare_linear  base + scale * sum w tau, entries of tau dropped at random and the rest divided by density
  dare_ties    the same task vectors, merged by sign as by ties

The models must be of one architecture and name their tokens alike. Config and tokenizer are those of the base, else of
the first model; merge.json says what was merged. One tensor of each model is in memory at a time, and one output file.
"""


def run(arguments: list[str]) -> None:
    parser = cli.Parser("merge", epilog=ABOUT)
    add = parser.add_argument
    add("--method", required=True, metavar="NAME", help="linear, slerp, ties, dare_linear or dare_ties")
    add("--model", required=True, action="append", metavar="DIR", help="a model folder or hub name; repeat for each")
    add("--weights", type=_numbers, metavar="W,W", help="one a --model, in their order (1 each)")
    add("--base", metavar="DIR", help="what the models were trained from, for ties and dare")
    add("--density", type=float, metavar="D", help="share of each task vector that ties and dare keep")
    add("--scale", type=float, metavar="X", help="factor of the merged task vector (1)")
    add("--seed", type=int, metavar="N", help="of what dare drops (0)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights written (as in base or first)")
    add("--to", required=True, metavar="DIR", help="folder to write, new or empty; may be gs://")
    flags = parser.parse_args(arguments)
    weights = flags.weights or (1.0,) * len(flags.model)
    if len(weights) != len(flags.model):
        raise ConfigError(f"--weights: {len(weights)} numbers for {len(flags.model)} models; give one a --model")
    recipe = Recipe(flags.method, weights, flags.density, flags.scale, flags.seed)
    target = cli.new_folder("--to", flags.to)

    from jaxpost.models import hf  # after the flags are found good: what follows loads jax
    from jaxpost.train.folder import is_run, model_folder

    def find(path: str) -> str:
        if is_run(path):
            raise CheckpointError(f"{path}: a run folder; give its export ({path}/export, or see jaxpost export)")
        return str(model_folder(path))

    base, models = flags.base and find(flags.base), [find(path) for path in flags.model]
    check_words([base, *models] if base else models)
    hf.merge(target, models, recipe, base=base, dtype=flags.dtype, track=_bar)
    print(target)


def check_words(folders: list[str]) -> None:
    """Raises CheckpointError where an id stands for different tokens. A folder without a tokenizer says nothing."""
    from etils import epath

    from jaxpost.data.tokenizers import MODEL_FILES, first_difference, load_tokenizer

    given = [folder for folder in folders if any((epath.Path(folder) / name).exists() for name in MODEL_FILES)]
    lead, *others = [load_tokenizer(folder) for folder in given] or [None]
    for tokenizer in others:
        if (index := first_difference(tokenizer, lead)) is not None:
            raise CheckpointError(
                f"{tokenizer.name}: token {index} is {tokenizer.token(index)!r}, but {lead.token(index)!r} in "
                f"{lead.name}; models whose tokens differ cannot be merged"
            )


def _bar(pieces):
    """The tensors one after another, with a bar where the output is a terminal (jax, asked, would start devices)."""
    console = Console()
    return track(pieces, "tensors", console=console, transient=True, disable=not console.is_terminal)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None
