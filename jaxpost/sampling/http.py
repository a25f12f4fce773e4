"""Sampling from an OpenAI-compatible server: vLLM, SGLang, or what answers as they do.

Tokens go in as ids and come back as ids, with the log-probability of each (`/v1/completions`). Every completion is a
request of its own, with a seed of its own: what is drawn depends on the key, the prompt's index and the number of the
completion alone, as far as the server keeps to seeds (vLLM does; SGLang with --enable-deterministic-inference). The
server's prefix cache computes a prompt once all the same.
"""

import dataclasses
import itertools
import logging
import queue
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxpost.data.sources.base import require
from jaxpost.errors import ConfigError, EngineError
from jaxpost.sampling.engine import Sampling, check_prompts
from jaxpost.schema import imported
from jaxpost.types import Completion

BUSY = (408, 425, 429)  # beside all of 5xx: worth another try
LONGEST_WAIT = 30.0  # seconds between two tries
BIAS = 100.0  # the largest that servers add to a logit
UNLIMITED = 2**31  # tokens, where the server does not say how long its context is
log = logging.getLogger("jaxpost")


class HttpEngine:
    """An `Engine` on a server that holds the weights; `push` gives it new ones.

    Args:
      url: of the server, as http://host:8000 or http://host:8000/v1.
      model: name under which the server has the model; None: the first that it lists.
      api_key: sent as a bearer token.
      concurrency: requests under way at once.
      timeout_s: seconds to wait for a reply; connecting may take 10 of them.
      retries: of a request that fails by time-out, connection, 408, 425, 429 or 5xx.
      backoff_s: seconds before the first of these; each further one waits twice as long, at most 30.
      need_logps: raise where the server's log-probabilities are not those under softmax(logits / temperature); False:
        they are NaN then.
      reload: how the server gets new weights, see `push`.

    Raises ConfigError for a URL that is none, and EngineError, which names URL and cause, where the server does not do
    what it is asked. Nothing is lost by that: a run goes on from its last checkpoint.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        retries: int = 5,
        backoff_s: float = 1.0,
        need_logps: bool = True,
        reload: str | None = None,
    ):
        if not re.match(r"https?://[^/]", url):
            raise ConfigError(f"sampling.url: {url!r} is no URL; expected http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.reload, self.need_logps = reload, need_logps
        self._http = require("httpx2", "http", "sampling from a server")
        self._anyio = require("anyio", "http", "sampling from a server")
        self._from_thread = require("anyio.from_thread", "http", "sampling from a server")
        self._model, self._context, self._raw = model, None, None  # asked for when first needed
        self._concurrency, self._retries, self._backoff = concurrency, retries, backoff_s
        self._warned = 0  # tries of one request that the log has told of
        self._client_settings = {
            "timeout": self._http.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            "limits": self._http.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        }

    def stream(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        key,
        *,
        settings: Sampling,
        completions: int = 1,
        indices: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """As `Engine.stream`; `params` are not looked at. EOS of the server's model ends a completion too, unless
        settings.stop_ids are empty."""
        if any(abs(bias) > BIAS for _, bias in settings.logit_bias):
            raise ConfigError(f"sampling.logit_bias: servers take {-BIAS:.0f} to {BIAS:.0f}")
        if settings.choices and not settings.stop_ids and _one_begins_another(settings.choices):
            raise ConfigError("sampling.choices: one begins another, and there is no stop token that would end it")
        indices = range(len(prompts)) if indices is None else indices
        seeds = _seeds(key, indices, completions)
        found: list[dict] = [{} for _ in prompts]
        for n, g, completion in self._in_thread(self._draw, prompts, seeds, settings, indices):
            found[n][g] = completion
            if len(found[n]) == completions:
                yield n, tuple(found[n][g] for g in range(completions))

    def push(self, folder) -> None:
        """Has the server read the weights of an exported model folder, which it must see under the same path.

        By what `reload` is:
          a URL that ends in /collective_rpc: vLLM's (start it with VLLM_SERVER_DEV_MODE=1); its prefix cache, which
            holds what the old weights computed, is emptied too;
          another URL: gets {"model_path": folder}, as SGLang's /update_weights_from_disk;
          pkg.mod:fn: a function of the folder; it raises where it fails;
          anything else: a command, run with the folder as its last argument.

        Raises EngineError where the server still has its old weights, or may have: nothing should be sampled then.
        """
        folder = str(folder)
        if self.reload is None:
            raise ConfigError("sampling.reload: missing; how does the server get the weights that were just trained?")
        if re.match(r"https?://", self.reload):
            for _ in self._in_thread(self._reload, folder):
                pass
        elif re.fullmatch(r"[\w.]+:\w+", self.reload):
            function = imported("sampling.reload", self.reload)
            try:
                function(folder)
            except Exception as error:
                raise EngineError(f"sampling.reload: {self.reload}({folder!r}) raised {error!r}") from error
        else:
            try:
                subprocess.run([*shlex.split(self.reload), folder], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
                raise EngineError(f"sampling.reload: {self.reload} {folder} failed ({''.join(said)})") from None

    # ---- what runs in the event loop ----

    def _in_thread(self, function, *args) -> Iterator:
        """What `await function(client, put, *args)` puts, as it comes.

        It runs in a thread of its own (a notebook's own event loop is busy), and is cancelled where nobody wants more.
        """
        found: queue.SimpleQueue = queue.SimpleQueue()

        async def work():
            try:
                async with self._http.AsyncClient(**self._client_settings) as client:
                    await function(client, found.put, *args)
            except BaseExceptionGroup as group:
                raise _first(group) from None

        with self._from_thread.start_blocking_portal() as portal:
            future = portal.start_task_soon(work)
            future.add_done_callback(lambda _: found.put(None))
            try:
                while (item := found.get()) is not None:
                    yield item
                future.result()
            finally:
                future.cancel()

    async def _draw(self, client, put, prompts, seeds, settings: Sampling, indices):
        """Puts (prompt, number, completion) of each as it is finished."""
        await self._look(client)
        check_prompts(prompts, settings, self._context, indices)
        known = await self._knows_logps(client, prompts, settings) if len(prompts) else True
        jobs = iter(list(np.ndindex(seeds.shape)))

        async def work():
            for n, g in jobs:
                name = f"prompt {indices[n]}"
                one = self._choose if settings.choices else self._complete
                completion = await one(client, name, prompts[n].tolist(), int(seeds[n, g]), settings)
                if not known:
                    completion = dataclasses.replace(completion, logps=np.full_like(completion.logps, np.nan))
                elif settings.temperature and not settings.filtered:
                    completion = dataclasses.replace(completion, drawn_logps=completion.logps)
                put((n, g, completion))

        async with self._anyio.create_task_group() as group:
            for _ in range(min(self._concurrency, seeds.size)):
                group.start_soon(work)

    async def _look(self, client):
        """Asks once which model the server has, and how long its context is."""
        if self._context is not None:
            return
        reply = await self._ask(client, "GET", f"{self.url}/models")
        models = {entry["id"]: entry for entry in reply.get("data", ())}
        name = self._model or next(iter(models), None)
        if name not in models:
            raise EngineError(f"{self.url}/models: no model {name or ''}; there are {', '.join(models) or 'none'}")
        self._model, self._context = name, models[name].get("max_model_len") or UNLIMITED

    async def _knows_logps(self, client, prompts, settings: Sampling) -> bool:
        """Whether what the server reports is log-probabilities under softmax(logits / temperature).

        Some report them before temperature, bias and filters (vLLM's default), some after. Which is asked where the
        settings make a difference, once: a token that is hardly possible is forced by a bias. Raises EngineError where
        it matters and they are not.
        """
        tempered, filtered = settings.temperature not in (0, 1), settings.filtered
        if not (tempered or filtered):
            return True
        if self._raw is None:
            token = int(prompts[0][0])
            once = Sampling(max_new_tokens=1, logit_bias=((token, BIAS),))
            forced = await self._complete(client, "a test prompt", [token], 0, once)
            if forced.tokens.tolist() != [token]:
                raise EngineError(f"{self.url}: does not heed logit_bias: {BIAS:.0f} for one token, and another came")
            self._raw = bool(forced.logps[0] < -1e-3)
        if (self._raw and not tempered) or (not self._raw and not filtered):
            return True
        if not self.need_logps:
            return False
        what = "before temperature and filters" if self._raw else "after temperature and filters"
        remedy = (
            "no server can with both temperature and filters: set sampling.temperature=1, or leave the filters out"
            if tempered and filtered
            else "start vLLM with --logprobs-mode=processed_logprobs, or set sampling.temperature=1"
            if tempered
            else "start vLLM with --logprobs-mode=raw_logprobs, or leave the filters out"
        )
        raise EngineError(f"{self.url}: reports log-probabilities {what}, which training cannot match; {remedy}")

    async def _complete(self, client, name: str, prompt: list[int], seed: int, settings: Sampling) -> Completion:
        body = _body(prompt, seed, settings) | {"model": self._model}
        reply = await self._ask(client, "POST", f"{self.url}/completions", body, name)
        return self._read(reply, name, prompt, settings)

    async def _choose(self, client, name: str, prompt: list[int], seed: int, settings: Sampling) -> Completion:
        """One of settings.choices, token by token: bias leaves only what may come next.

        Equal for all that may come, it does not change their proportions; that every server takes it cannot be said of
        grammars, which also know texts only, not tokens.
        """
        tokens, logps, own = [], [], dict(settings.logit_bias)
        while len(tokens) < settings.max_new_tokens:
            fitting = [choice for choice in settings.choices if choice[: len(tokens)] == tuple(tokens)]
            allowed = {choice[len(tokens)] for choice in fitting if len(choice) > len(tokens)}
            if tuple(tokens) in fitting:
                allowed |= set(settings.stop_ids)
            most = max(own.get(token, 0.0) for token in allowed)
            bias = tuple((token, BIAS + own.get(token, 0.0) - most) for token in sorted(allowed))
            once = Sampling(
                max_new_tokens=1,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
                repetition_penalty=settings.repetition_penalty,
                logit_bias=bias,
                stop_ids=settings.stop_ids,
            )
            drawn = await self._complete(client, name, prompt + tokens, (seed + len(tokens)) % 2**31, once)
            token = int(drawn.tokens[0])
            if token not in allowed:
                raise EngineError(f"{self.url}: does not heed logit_bias: {name} was answered by none of the choices")
            tokens.append(token)
            logps.append(drawn.logps)
            longer = any(len(choice) > len(tokens) and choice[: len(tokens)] == tuple(tokens) for choice in fitting)
            if token in settings.stop_ids or not longer:
                return Completion(np.array(tokens, np.int32), np.concatenate(logps), "stop")
        return Completion(np.array(tokens, np.int32), np.concatenate(logps), "length")

    def _read(self, reply: dict, name: str, prompt: list[int], settings: Sampling) -> Completion:
        """The one completion of a reply."""
        fail = f"{self.url}/completions: "
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != 1:
            raise EngineError(f"{fail}one completion was asked for, the reply has none or several")
        choice = choices[0]
        logprobs = choice.get("logprobs") or {}
        if (seen := choice.get("prompt_token_ids")) is not None and seen != prompt:
            raise EngineError(f"{fail}{name} had {len(prompt)} tokens, the server saw {len(seen)} others")
        tokens = choice.get("token_ids")
        if tokens is None:  # vLLM before 0.11 writes them so in place of the tokens' text
            words = [str(word).partition("token_id:") for word in logprobs.get("tokens") or ("",)]
            tokens = [int(end) for start, mark, end in words if not start and mark and end.isdecimal()]
            tokens = tokens if len(tokens) == len(words) else None
        if tokens is None:
            raise EngineError(
                f"{fail}the reply has no token ids; wanted vLLM from 0.11 or a SGLang that knows return_token_ids, or "
                "start vLLM with --return-tokens-as-token-ids"
            )
        logps = logprobs.get("token_logprobs")
        if not logps or None in logps or len(logps) != len(tokens):
            raise EngineError(
                f"{fail}the reply has no log-probability for each token; the server must allow logprobs=1 (vLLM: "
                "--max-logprobs of at least 1)"
            )
        reason = "stop" if tokens[-1] in settings.stop_ids else choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise EngineError(f"{fail}a completion of {name} ended with finish_reason={reason!r}")
        return Completion(np.array(tokens, np.int32), np.array(logps, np.float32), reason)

    async def _reload(self, client, put, folder: str):
        if not self.reload.endswith("/collective_rpc"):
            reply = await self._ask(client, "POST", self.reload, {"model_path": folder}, "new weights", json=False)
            if isinstance(reply, dict) and reply.get("success") is False:
                raise EngineError(f"{self.reload}: {folder} was not loaded ({reply.get('message', 'no reason given')})")
            return
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._ask(client, "POST", self.reload, body, "new weights", json=False)
        reset = self.reload.removesuffix("/collective_rpc") + "/reset_prefix_cache?reset_running_requests=true"
        await self._ask(client, "POST", reset, None, "emptying the prefix cache", json=False)

    async def _ask(self, client, method: str, url: str, body=None, name: str = "", json: bool = True):
        """The reply's JSON, after as many tries as there may be. json: False, where a reply without it will do."""
        for attempt in itertools.count(1):
            wait = self._backoff * 2 ** (attempt - 1)
            try:
                response = await client.request(method, url, json=body)
            except self._http.TimeoutException:
                cause = "no reply in time (sampling.timeout_s)"
            except self._http.TransportError as error:
                cause = str(error) or type(error).__name__
            except self._http.InvalidURL as error:
                raise ConfigError(f"sampling.url: {url}: {error}") from None
            else:
                if response.is_success:
                    return self._json(url, response, json)
                cause = f"{response.status_code} {_message(response)}"
                if response.status_code not in BUSY and response.status_code < 500:
                    raise EngineError(f"{url}: refused {name or method}: {cause}")
                asked = response.headers.get("retry-after", "")
                wait = max(wait, float(asked)) if asked.isdecimal() else wait
            if attempt > self._retries:
                raise EngineError(f"{url}: {cause}; given up after {attempt} tries")
            if attempt > self._warned:  # once for all requests under way
                self._warned = attempt
                log.warning("%s: %s; trying again", url, cause)
            await self._anyio.sleep(min(wait, LONGEST_WAIT))

    def _json(self, url: str, response, needed: bool):
        try:
            reply = response.json()
        except ValueError:
            reply = None
        if needed and not isinstance(reply, dict):
            raise EngineError(f"{url}: the reply is not a JSON object; is this an OpenAI-compatible server?")
        return reply


def _seeds(key, indices: Sequence[int], completions: int) -> np.ndarray:
    """int[N, G] below 2^31: of each completion, by key, prompt's index and number."""
    of_prompt = jax.vmap(lambda index: jax.random.fold_in(key, index))(np.asarray(list(indices), np.uint32))
    numbers = np.arange(completions, dtype=np.uint32)
    drawn = jax.vmap(lambda k: jax.vmap(lambda g: jax.random.bits(jax.random.fold_in(k, g)))(numbers))(of_prompt)
    return np.asarray(drawn).astype(np.int64) >> 1


def _body(prompt: list[int], seed: int, settings: Sampling) -> dict:
    """The request in the words of vLLM and of SGLang, each of which passes over what only the other knows.

    All is said, also what is off: a server has defaults of its own (the model's generation_config.json).
    """
    bias = {"logit_bias": {str(token): bias for token, bias in settings.logit_bias}} if settings.logit_bias else {}
    return bias | {
        "prompt": prompt,
        "n": 1,
        "seed": seed,
        "max_tokens": settings.max_new_tokens,
        "min_tokens": settings.min_new_tokens,
        "temperature": settings.temperature,
        "top_k": settings.top_k or -1,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "stop_token_ids": list(settings.stop_ids),
        "stop": list(settings.stop),
        "ignore_eos": not settings.stop_ids,
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,  # vLLM
        "no_stop_trim": True,  # SGLang: the tokens of a stop stay
    }


def _one_begins_another(choices: Sequence[tuple[int, ...]]) -> bool:
    return any(one != other and other[: len(one)] == one for one in choices for other in choices)


def _message(response) -> str:
    """What a server says of an error, in one line."""
    try:
        reply = response.json()
        error = reply.get("error", reply)
        text = error.get("message", str(error)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        text = response.text or response.reason_phrase
    return " ".join(text.split())[:300]


def _first(group: BaseExceptionGroup) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
