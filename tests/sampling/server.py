"""A small real server that answers as vLLM does, over a fake model: logits that depend on the last token and the place.

What it can be told to do: fail a number of times, hang, go away, leave out ids or log-probabilities, report processed
ones, draw from another model.
"""

import asyncio
import contextlib
import threading
import time

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

VOCAB = 40


def logits(tokens: list[int]) -> np.ndarray:
    """f64[VOCAB] of the fake model, for what comes after the tokens."""
    return 2 * np.random.default_rng([tokens[-1], len(tokens)]).normal(size=VOCAB)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def complete(body: dict, processed: bool = False, logits=logits) -> tuple[list[int], list[float], str]:
    """(tokens, log-probabilities, finish reason) for a request, in vLLM's order of bias, temperature, filters."""
    tokens, logps = [], []
    while len(tokens) < body["max_tokens"]:
        raw = logits(body["prompt"] + tokens)
        x = raw.copy()
        for token, bias in body.get("logit_bias", {}).items():
            x[int(token)] += bias
        if len(tokens) < body["min_tokens"]:
            x[body["stop_token_ids"]] = -np.inf
        greedy = body["temperature"] == 0
        x = x if greedy else x / body["temperature"]
        if body["top_k"] > 0:
            x[x < np.sort(x)[-body["top_k"]]] = -np.inf
        noise = 0 if greedy else np.random.default_rng([body["seed"], len(tokens)]).gumbel(size=len(x))
        token = int(np.argmax(x + noise))
        tokens.append(token)
        logps.append(float(log_softmax(x if processed else raw)[token]))
        if token in body["stop_token_ids"]:
            return tokens, logps, "stop"
    return tokens, logps, "length"


class Server:
    """At `url` while the block lasts; `requests` holds every body that came, `keys` the keys that came with them."""

    def __init__(self):
        self.requests, self.keys, self.paths = [], [], []
        self.failures = []  # statuses of the next replies
        self.context = 64
        self.hang_s = 0.0
        self.last = None  # completions until it goes away, without a reply to the next one
        self.logits = logits  # of its model
        self.load = lambda folder: None  # what it does with new weights
        self.processed = False
        self.without = ()  # fields of a choice that are left out
        self.change = {}  # fields of a choice that are others
        self.under_way = self.most_under_way = 0
        self.reloaded = {"success": True}
        routes = [Route("/v1/models", self._models), Route("/v1/completions", self._completions, methods=["POST"])]
        routes += [
            Route(path, self._reload, methods=["POST"])
            for path in ("/update_weights_from_disk", "/collective_rpc", "/reset_prefix_cache")
        ]
        # Its logging settings would close the handlers of others: that of absl closes pytest's captured stderr.
        settings = {"port": 0, "log_config": None, "lifespan": "off", "loop": "asyncio", "ws": "none"}
        config = uvicorn.Config(Starlette(routes=routes), **settings, timeout_graceful_shutdown=0)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self._server.should_exit = True
        self._thread.join()

    async def _models(self, request):
        return JSONResponse({"data": [{"id": "fake", "max_model_len": self.context}, {"id": "other"}]})

    async def _completions(self, request):
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("authorization"))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(self.hang_s)
        finally:
            self.under_way -= 1
        if self.failures:
            status = self.failures.pop(0)
            return JSONResponse({"error": {"message": "out of\nsorts", "code": status}}, status)
        if self.last == 0:
            self._server.should_exit = True
            await asyncio.sleep(60)  # until it is cancelled
        self.last = self.last and self.last - 1
        tokens, logps, reason = complete(body, self.processed, self.logits)
        logprobs = {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": logps}
        choice = {"index": 0, "text": "?", "logprobs": logprobs, "finish_reason": reason, "token_ids": tokens}
        choice |= {"prompt_token_ids": body["prompt"], **self.change}
        choice = {name: value for name, value in choice.items() if name not in self.without}
        return JSONResponse({"id": "1", "object": "text_completion", "choices": [choice]})

    async def _reload(self, request):
        self.paths.append(request.url.path)
        body = await request.json() if await request.body() else None
        self.requests.append(body)
        self.load((body or {}).get("model_path"))
        return JSONResponse(self.reloaded)
