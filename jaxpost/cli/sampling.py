"""The flags that say how and by whom completions are drawn, for the verbs that draw some."""

import argparse
import os

from jaxpost.errors import ConfigError


def add_flags(parser, *, temperature: float, max_new_tokens: int) -> None:
    """One flag for each field of `sampling.engine.Sampling`, and those of a server; the defaults are the verb's."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"most of an answer ({max_new_tokens})")
    add("--min-new-tokens", type=int, default=0, metavar="N", help="no end of an answer before so many tokens (0)")
    text = f"0: the likeliest token each time ({temperature:g})"
    add("--temperature", type=float, default=temperature, metavar="T", help=text)
    add("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that sum to P (1)")
    add("--min-p", type=float, default=0.0, metavar="P", help="only tokens P times as likely as the likeliest (0)")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="of tokens that were seen before (1)")
    text = "is added to the logit of token ID; repeatable"
    add("--logit-bias", type=_bias, action="append", default=[], metavar="ID=BIAS", help=text)
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer, and is not shown; repeatable")
    add("--stop-id", type=int, action="append", default=[], metavar="ID", help="ends one, beside EOS; repeatable")
    text = "an answer is one of these texts; repeat for each"
    add("--choice", action="append", default=[], metavar="TEXT", help=text)
    text = "server that draws (vLLM, SGLang), as http://localhost:8000; the checkpoint then is the tokenizer's"
    add("--url", metavar="URL", help=text)
    add("--served-model", metavar="NAME", help="the model's name there (the first that it lists)")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the server's key")
    add("--concurrency", type=int, default=64, metavar="N", help="requests to the server at once (64)")


def check(parser, flags) -> None:
    """Raises ConfigError for flags that are out of range or contradict each other, before anything is loaded."""
    settings(flags)
    if flags.concurrency < 1:
        parser.error(f"--concurrency: {flags.concurrency} is out of range; expected at least 1")
    if flags.url and flags.adapter:
        parser.error("--adapter: contradicts --url, whose server has weights of its own; leave it out")
    if flags.api_key_env and not os.environ.get(flags.api_key_env):
        parser.error(f"--api-key-env: there is no environment variable {flags.api_key_env}")


def server(flags):
    """The engine that asks the server of --url, or None without."""
    if not flags.url:
        return None
    from jaxpost.sampling.http import HttpEngine

    key = os.environ[flags.api_key_env] if flags.api_key_env else None
    names = {"model": flags.served_model, "api_key": key, "concurrency": flags.concurrency}
    return HttpEngine(flags.url, **names, need_logps=False)


def settings(flags, tokenizer=None):
    """The `Sampling` that the flags name; without a tokenizer only to see whether they can be. Raises ConfigError."""
    from jaxpost.sampling.engine import Sampling

    if flags.choice and not all(flags.choice):
        raise ConfigError("--choice: empty; wanted texts")
    ends = tokenizer.stop_ids if tokenizer else ()
    choices = tuple(tuple(tokenizer.encode(text)) for text in flags.choice) if tokenizer else ()
    try:
        return Sampling(
            max_new_tokens=flags.max_new_tokens,
            min_new_tokens=flags.min_new_tokens,
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            min_p=flags.min_p,
            repetition_penalty=flags.repetition_penalty,
            logit_bias=tuple(flags.logit_bias),
            stop_ids=tuple(sorted({*ends, *flags.stop_id})),
            stop=tuple(flags.stop),
            choices=choices or None,
        )
    except ConfigError as error:  # it names a key of a config, which here is a flag
        name, _, rest = str(error).removeprefix("sampling.").partition(":")
        raise ConfigError(f"--{name.replace('_', '-')}:{rest}") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID=BIAS, as in 42=-1.5, got {text!r}") from None
