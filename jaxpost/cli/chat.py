"""`jaxpost chat --checkpoint=DIR`: a conversation with a run, an export or any folder in Hugging Face layout."""

import sys

from jaxpost import cli


def run(arguments: list[str]) -> None:
    parser = cli.Parser("chat")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder, model folder or embedded:sft")
    parser.add_argument("--adapter", metavar="DIR", help="adapter for it, in the layout of PEFT")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer")
    flags = parser.parse_args(arguments)
    if flags.max_new_tokens < 1:
        parser.error(f"--max-new-tokens: {flags.max_new_tokens} is out of range; expected at least 1")
    from jaxpost import api  # loads jax

    model = api.load(flags.checkpoint)
    converse(model.with_adapter(flags.adapter) if flags.adapter else model, flags.max_new_tokens)


def converse(model, max_new_tokens: int) -> None:
    """Reads turns from standard input until its end; an empty line begins a new conversation."""
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
        answer = model.chat(messages, max_new_tokens)
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)
