"""`jaxpost chat --checkpoint=DIR`: a conversation with a run, an export or any folder in Hugging Face layout."""

import dataclasses
import secrets
import sys

from jaxpost import cli
from jaxpost.cli import sampling


def run(arguments: list[str]) -> None:
    parser = cli.Parser("chat")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder, model folder or embedded:sft")
    parser.add_argument("--adapter", metavar="DIR", help="adapter for it, in the layout of PEFT")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws, with a --temperature (another each time)")
    sampling.add_flags(parser, temperature=0.0, max_new_tokens=256)
    flags = parser.parse_args(arguments)
    sampling.check(parser, flags)
    from jaxpost import api  # loads jax

    model = api.load(flags.checkpoint, weights=flags.url is None)
    if flags.adapter:
        model = model.with_adapter(flags.adapter)
    how = dataclasses.asdict(sampling.settings(flags, model.model.tokenizer)) | {"engine": sampling.server(flags)}
    converse(model, how, secrets.randbits(30) if flags.seed is None else flags.seed)


def converse(model, how: dict, seed: int) -> None:
    """Reads turns from standard input until its end; an empty line begins a new conversation.

    how: what `LoadedModel.chat` takes besides; each turn draws by another seed.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        print("An empty line begins a new conversation, Ctrl-D ends it.")
    messages = []
    while True:
        try:
            words = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not words:
            messages = []
            continue
        messages.append({"role": "user", "content": words})
        answer = model.chat(messages, seed=seed, **how)
        seed += 1
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)
