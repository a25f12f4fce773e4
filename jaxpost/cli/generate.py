"""`jaxpost generate --checkpoint=DIR --prompts=FILE --to=OUT.jsonl`: completions for a file of prompts, resumable."""

import argparse
import dataclasses

from rich.console import Console
from rich.progress import track

from jaxpost import cli
from jaxpost.cli import sampling

ABOUT = """A prompt is a record of any format: `prompt` (raw text, which is continued, or messages), `messages` or
`conversations` (a last turn of the assistant's is left out), or what precedes the answer in the other formats.

OUT gets one JSON line a prompt: index, the prompt as `messages` or `prompt`, and `completions`, each with text,
finish_reason (stop or length), tokens, logp (sum over its tokens, in nats, at this temperature) and, with --reward,
score. The same command goes on where it was stopped; once all is there the lines are in the order of the prompts, and
the file is what it would have been without a stop. OUT.settings.json says what it was made with.

A function is named by its dotted path, pkg.mod:fn, and called with the messages (or raw text), the completion's text
and the record of the prompt; what it returns is the score.

With --url a server draws (vLLM, SGLang; extra `http`); --checkpoint then names its tokenizer and chat template.
"""


def run(arguments: list[str]) -> None:
    flags = parse(arguments)
    from jaxpost import api, embedded  # after the flags are found good: what follows loads jax
    from jaxpost.data.sources import open_source
    from jaxpost.data.workers import cores
    from jaxpost.train import generation
    from jaxpost.train.prompts import read_prompts
    from jaxpost.train.scoring import open_scorer

    source = open_source(embedded.resolve(flags.prompts))
    model = api.load(flags.checkpoint, weights=flags.url is None)
    if flags.adapter:
        model = model.with_adapter(flags.adapter)
    settings = sampling.settings(flags, model.model.tokenizer)
    asked = read_prompts(source, model.model, settings)
    scorer = None
    if flags.reward:
        how = {"timeout_s": flags.reward_timeout, "workers": cores()}
        scorer = open_scorer(flags.reward, "--reward", model.model, model.mesh, **how)
    output = generation.Output(flags.to, describe(flags, source, model, scorer, settings))
    if output.done:
        print(f"{flags.to}: going on after {len(output.done):,} of {len(asked):,} prompts")
    context = generation.context_of(model, asked, settings)
    made = generation.generate(
        model,
        sampling.server(flags) or model.engine(slots=flags.slots, quantized=flags.int8_cache, context=context),
        asked,
        output,
        settings=settings,
        seed=flags.seed,
        completions=flags.best_of or flags.completions,
        keep=flags.completions if flags.best_of else None,
        score=scorer,
        token_ids=flags.token_ids,
    )
    console = Console()
    left = len(asked) - len(output.done)
    for _ in track(made, "prompts", total=left, console=console, transient=True, disable=not console.is_terminal):
        pass
    if scorer is not None:
        scorer.close()
    print(f"{flags.to}: {len(asked):,} prompts")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.Parser("generate", epilog=ABOUT)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="run folder, model folder or embedded:sft")
    add("--adapter", metavar="DIR", help="adapter for it, in the layout of PEFT")
    add("--prompts", required=True, metavar="FILE", help="file, folder or data set of prompts, or embedded:prompts")
    add("--to", required=True, metavar="OUT.jsonl", help="file to write, or to go on with")
    add("--completions", type=int, default=1, metavar="N", help="of each prompt (1)")
    add("--best-of", type=int, metavar="N", help="draw N, and keep those --completions that --reward scores best")
    add("--reward", metavar="DIR", help="what scores the completions: a reward model's run or folder, or a function")
    add("--reward-timeout", type=float, default=60.0, metavar="S", help="most seconds of a function's call (60)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    add("--token-ids", action="store_true", help="write each completion's token_ids too")
    add("--slots", type=int, default=32, metavar="N", help="completions that are drawn at once, without --url (32)")
    add("--int8-cache", action="store_true", help="keys and values in int8: a quarter of the memory, without --url")
    sampling.add_flags(parser, temperature=1.0, max_new_tokens=256)
    flags = parser.parse_args(arguments)
    sampling.check(parser, flags)
    for name in ("completions", "best_of", "slots"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value} is out of range; expected at least 1")
    if not 0 < flags.reward_timeout < float("inf"):
        parser.error(f"--reward-timeout: {flags.reward_timeout:g} is out of range; expected seconds above 0")
    if flags.best_of and not flags.reward:
        parser.error("--reward: missing; --best-of needs what says which is best")
    if flags.best_of and flags.best_of < flags.completions:
        parser.error(f"--best-of: {flags.best_of} are fewer than the --completions={flags.completions} to keep")
    return flags


def describe(flags, source, model, scorer, settings) -> dict:
    """All that decides what is written."""
    return {
        "checkpoint": None if flags.url else model.fingerprint(),
        "served_model": flags.served_model if flags.url else None,
        "engine": "http" if flags.url else "local",
        "int8_cache": flags.int8_cache,
        "tokenizer": model.model.tokenizer.fingerprint,
        "template": model.model.template.fingerprint,
        "prompts": source.fingerprint,
        "reward": scorer and scorer.fingerprint,
        **{f"sampling.{name}": value for name, value in dataclasses.asdict(settings).items()},
        **{name: getattr(flags, name) for name in ("completions", "best_of", "seed", "token_ids")},
    }
