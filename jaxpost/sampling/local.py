"""The engine of this process: continuous batching over the mesh at hand, with the model code that trains.

A fixed number of slots decodes in jitted blocks of steps; between two blocks the host takes what is finished and puts
waiting completions into the slots that are free. A prompt is read once, in pieces, but for its last token; what was
read is copied into the slot of each of its completions, which begin with that token, as branches of packed rows do.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxpost.errors import ConfigError
from jaxpost.models.cache import AXES as CACHE_AXES
from jaxpost.models.cache import KV, Cache
from jaxpost.models.policy import Policy
from jaxpost.ops.logprobs import logits
from jaxpost.sampling import draw
from jaxpost.sampling.engine import Sampling, check_prompts, until_stop
from jaxpost.sampling.trie import Trie, allowed, follow, make_trie
from jaxpost.sharding import batch_shards, fetch, named_shardings
from jaxpost.types import Array, Completion, record

ADMITTED = 8  # completions that one call puts into slots
REASONS = {1: "stop", 2: "length"}
SHORTEST = 64  # tokens of a cache


@record
class Slots:
    """What decodes: C completions, each in a slot of its own. [C] each."""

    cache: Cache
    keys: Array  # typed; a token's is fold_in(key, number of the token)
    token: Array  # int32, the newest: not in the cache yet
    position: Array  # int32, of the next token to be read; -1 where the slot is free
    drawn: Array  # int32, tokens drawn
    most: Array  # int32, tokens to be drawn at most
    node: Array  # int32, of the trie of choices
    seen: Array | None  # bool[C, V], tokens of prompt and completion, where there is a repetition penalty


@record
class Filters:
    """`Sampling` on the device; None where it is off, so that a program computes only what is asked for."""

    stops: Array  # int32[n]
    temperature: Array | None
    penalty: Array | None
    bias: Array | None  # f32[V]
    fewest: Array | None
    trie: Trie | None
    top_k: Array | None
    top_p: Array | None
    min_p: Array | None


@dataclasses.dataclass(frozen=True)
class LocalEngine:
    """An `Engine`: see its `stream` for what it promises.

    mesh: over which slots (the axes of rows) and weights lie; None: one device.
    slots: completions that decode at once; rounded up to what the mesh divides. Fewer slots wait less for the longest
      completion and read the weights more often.
    context: longest prompt and completion together, in tokens; None: as the prompts of a call need. Draws repeat to the
      bit in one program, and this is part of it.
    prefill_rows, prefill_tokens: prompts read at once, and tokens of each in one piece.
    block_steps: most tokens drawn between two looks of the host.
    quantized: keys and values are held in int8, for a quarter of the memory and a little of the precision.
    decode: token ids -> text, for stop strings.
    """

    policy: Policy
    mesh: Any = None
    slots: int = 32
    context: int | None = None
    prefill_rows: int = 4
    prefill_tokens: int = 128
    block_steps: int = 32
    quantized: bool = False
    decode: Callable[[list[int]], str] | None = None

    def stream(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        key: Array,
        *,
        settings: Sampling,
        completions: int = 1,
        indices: Sequence[int] | None = None,
        limits: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """See `Engine.stream`. Prompts are taken longest first.

        limits: most new tokens of completion g of prompts[n], as [n][g], none above settings.max_new_tokens.
        """
        prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        longest = max(map(len, prompts), default=1) + settings.max_new_tokens
        context = self.context or min(roomy(longest), self.policy.config.max_positions)
        check_prompts(prompts, settings, context, indices)
        numbers = range(len(prompts)) if indices is None else indices
        limits = _limits(limits, (len(prompts), completions), settings.max_new_tokens)
        session = _Session(self, params, prompts, key, settings, completions, numbers, limits, context)
        while session.waiting or session.read or session.running:
            with self.on_mesh():
                session.fill()
                session.step()
            yield from session.finished()

    def rounded(self, rows: int) -> int:
        """At least `rows`, as many as the mesh divides."""
        shards = 1 if self.mesh is None else batch_shards(self.mesh)
        return -(-rows // shards) * shards

    def programs(self, params: Any, settings: Sampling, context: int) -> list[tuple[str, Callable, tuple]]:
        """(name, jitted function, arguments) of what a call of `stream` runs, for abstract `params` in their shards.

        "prefill" reads one piece of prefill_rows prompts, "admit" puts completions into slots, "decode" is a block.
        """
        with self.on_mesh():
            prepared = self._placed(jax.eval_shape(self.policy.prepared, params), like=params)
            sizes = (context, min(self.prefill_tokens, context), self.quantized)
            rows, slots = self.rounded(self.prefill_rows), self.rounded(self.slots)
            cache = self._placed(jax.eval_shape(functools.partial(_emptied, self.policy, rows, *sizes)))
            running = functools.partial(_new_slots, self.policy, slots, *sizes, settings.repetition_penalty != 1)
            running = self._placed(jax.eval_shape(running))
            filters = make_filters(settings, self.policy.config.vocab_size)
            piece = jax.ShapeDtypeStruct((rows, sizes[1]), jnp.int32)
            prefill = jax.jit(functools.partial(_prefill, self.policy), donate_argnums=3)
            decode = jax.jit(functools.partial(_block, self.policy, self.block_steps), donate_argnums=3)
            ints, words = (jax.ShapeDtypeStruct((ADMITTED,), kind) for kind in (jnp.int32, jnp.uint32))
            seen = running.seen and jax.ShapeDtypeStruct((ADMITTED, running.seen.shape[1]), bool)
            key = jax.eval_shape(lambda: jax.random.key(0))
            return [
                ("prefill", prefill, (prepared, piece, piece, cache)),
                ("admit", _admit, (running, cache, key, (words, words), ints, ints, ints, ints, ints, seen)),
                ("decode", decode, (prepared, filters, jax.ShapeDtypeStruct((), jnp.int32), running)),
            ]

    def _placed(self, tree, like=None):
        """Abstract arrays with the layouts they are made in: of `like`, or of caches and slots, rows first."""
        shaped = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        if like is not None:
            near = lambda p: NamedSharding(self.mesh, p.sharding.spec)  # noqa: E731 - wherever the weights wait
            return jax.tree.map(lambda x, p: shaped(x, near(p)), tree, like)
        axes = {5: ("layers", *CACHE_AXES), 4: CACHE_AXES, 2: ("batch", None), 1: ("batch",)}
        place = lambda x: named_shardings(axes[x.ndim], self.mesh, x)  # noqa: E731
        return jax.tree.map(lambda x: shaped(x, place(x)), tree)

    def on_mesh(self):
        """The context in which the engine's programs run."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def roomy(length: int) -> int:
    """A few lengths in each octave, so that few programs are compiled: the next of 64, 80, 96, 112, 128, 160, ..."""
    step = max(SHORTEST, 1 << (length - 1).bit_length()) // 8
    return max(SHORTEST, -(-length // step) * step)


def _limits(given, shape, most: int) -> np.ndarray:
    """int32 of `shape`: new tokens of each completion at most."""
    limits = np.full(shape, most, np.int32) if given is None else np.asarray(given, np.int32)
    if limits.shape != shape or (limits.size and not 1 <= limits.min() <= limits.max() <= most):
        raise ConfigError(f"limits: expected {shape[0]} x {shape[1]} (prompts, completions) of 1 to {most} new tokens")
    return limits


class _Session:
    """One call of `stream`."""

    def __init__(self, engine: LocalEngine, params, prompts, key, settings, completions, indices, limits, context):
        self.engine, self.policy, self.prompts, self.settings = engine, engine.policy, prompts, settings
        self.completions, self.indices, self.limits, self.context, self.key = completions, indices, limits, context, key
        self.chunk = min(engine.prefill_tokens, context)
        self.size = engine.rounded(engine.slots)
        self.waiting = collections.deque(sorted(range(len(prompts)), key=lambda n: -len(prompts[n])))
        self.read: collections.deque = collections.deque()  # (prompt, completion, row of `prefilled`) to be admitted
        self.running: dict[int, _Drawn] = {}  # by slot
        self.done: dict[int, dict[int, Completion]] = collections.defaultdict(dict)
        with engine.on_mesh():
            self.params = _prepared(self.policy, params)
            self.filters = make_filters(settings, self.policy.config.vocab_size)
            self.slots = _new_slots(*self._sizes(self.size), settings.repetition_penalty != 1)
        self.prefilled = None

    def _sizes(self, rows):
        return self.policy, rows, self.context, self.chunk, self.engine.quantized

    def fill(self):
        """Puts waiting completions into free slots, reading prompts as they are needed."""
        free = [slot for slot in range(self.size) if slot not in self.running]
        while free and (self.read or self.waiting):
            if not self.read:
                self.prefill()
            batch = [(*self.read.popleft(), free.pop(0)) for _ in range(min(ADMITTED, len(self.read), len(free)))]
            self.admit(batch)

    def prefill(self):
        """Reads the next few prompts, each but for its last token."""
        rows = self.engine.rounded(self.engine.prefill_rows)
        chosen = [self.waiting.popleft() for _ in range(min(rows, len(self.waiting)))]
        longest = max(len(self.prompts[n]) - 1 for n in chosen)
        tokens = np.zeros((rows, -(-longest // self.chunk) * self.chunk), np.int32)
        positions = np.full(tokens.shape, -1, np.int32)
        for row, n in enumerate(chosen):
            size = len(self.prompts[n]) - 1
            tokens[row, :size], positions[row, :size] = self.prompts[n][:-1], np.arange(size)
            self.read.extend((n, g, row) for g in range(self.completions))
        self.prefilled = _emptied(*self._sizes(rows)) if self.prefilled is None else _cleared(self.prefilled)
        for start in range(0, tokens.shape[1], self.chunk):
            piece = slice(start, start + self.chunk)
            args = tokens[:, piece], positions[:, piece]
            self.prefilled = _prefill(self.policy, self.params, *args, self.prefilled)

    def admit(self, batch):
        """(prompt, completion, row of `prefilled`, slot) each."""
        n, g, row, slot = (np.array(column + (0,) * (ADMITTED - len(batch))) for column in zip(*batch, strict=True))
        slot[len(batch) :] = self.size  # out of bounds: dropped
        prompts = [self.prompts[index] for index in n]
        token, position = np.array([[p[-1], len(p) - 1] for p in prompts], np.int32).T
        seen = None
        if self.slots.seen is not None:
            seen = np.zeros((ADMITTED, self.policy.config.vocab_size), bool)
            for i, prompt in enumerate(prompts):
                seen[i, prompt] = True
        index = np.array([self.indices[i] for i in n], np.uint32)
        ids = (index, g.astype(np.uint32))
        most = self.limits[n, g]
        self.slots = _admit(self.slots, self.prefilled, self.key, ids, row, slot, token, position, most, seen)
        self.running |= {slot: _Drawn(n, g) for n, g, _, slot in batch}

    def step(self):
        """One block of steps; takes what it drew. It ends early where a slot is free for what waits."""
        enough = max(1, self.size // 16) if self.read or self.waiting else self.size
        steps = self.engine.block_steps
        self.slots, drawn = _block(self.policy, steps, self.params, self.filters, enough, self.slots)
        count, ended, *values = fetch(drawn)
        for slot, found in self.running.items():
            ends = np.flatnonzero(ended[:count, slot])
            last = ends[0] + 1 if len(ends) else count
            found.add([value[:last, slot] for value in values], ended[last - 1, slot])

    def finished(self) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Prompts all of whose completions are there."""
        stopped = []
        for slot, found in list(self.running.items()):
            completion = found.completion(self.settings, self.engine.decode)
            if completion is None:
                continue
            if not found.ended:  # by a stop string, of which the device knows nothing
                stopped.append(slot)
            del self.running[slot]
            self.done[found.prompt][found.number] = completion
            if len(self.done[found.prompt]) == self.completions:
                of_prompt = self.done.pop(found.prompt)
                yield found.prompt, tuple(of_prompt[g] for g in range(self.completions))
        if stopped:
            self.slots = dataclasses.replace(self.slots, position=_freed(self.slots.position, np.array(stopped)))


class _Drawn:
    """What a slot has drawn so far."""

    def __init__(self, prompt: int, number: int):
        self.prompt, self.number, self.ended = prompt, number, 0
        self.parts: list[list[np.ndarray]] = []  # tokens, logps, drawn_logps of each block

    def add(self, values, ended):
        self.parts.append(values)
        self.ended = int(ended)

    def completion(self, settings: Sampling, decode) -> Completion | None:
        """The completion, if it is whole."""
        if not (self.ended or settings.stop):
            return None
        tokens, logps, drawn = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        cut = until_stop(tokens.tolist(), decode, settings.stop) if settings.stop else None
        if cut is not None:
            return Completion(tokens[:cut], logps[:cut], "stop", drawn[:cut])
        return Completion(tokens, logps, REASONS[self.ended], drawn) if self.ended else None


def make_filters(settings: Sampling, vocab_size: int) -> Filters:
    """Raises ConfigError for a token that is not in the vocabulary."""
    for name, tokens in (("logit_bias", [token for token, _ in settings.logit_bias]), ("stop_ids", settings.stop_ids)):
        if any(not 0 <= token < vocab_size for token in tokens):
            raise ConfigError(f"sampling.{name}: {list(tokens)} is not all in a vocabulary of {vocab_size} tokens")
    bias = None
    if settings.logit_bias:
        bias = np.zeros(vocab_size, np.float32)
        bias[[token for token, _ in settings.logit_bias]] = [value for _, value in settings.logit_bias]
    on = lambda value, off, kind=np.float32: None if value == off else kind(value)  # noqa: E731
    hot = settings.temperature > 0  # of what is greedy only the likeliest is left
    return Filters(
        stops=np.array(sorted(set(settings.stop_ids)), np.int32),
        temperature=on(settings.temperature, 0),
        penalty=on(settings.repetition_penalty, 1),
        bias=bias,
        fewest=on(settings.min_new_tokens, 0, np.int32),
        trie=settings.choices and make_trie(settings.choices, vocab_size, settings.stop_ids),
        top_k=on(settings.top_k, None, np.int32) if hot else None,
        top_p=on(settings.top_p, 1) if hot else None,
        min_p=on(settings.min_p, 0) if hot else None,
    )


def choose(filters: Filters, raw: Array, slots: Slots) -> tuple[Array, Array, Array]:
    """The next token of every slot out of f32[C, V] logits: (tokens, logps, drawn_logps), as in `Completion`."""
    z = raw
    if filters.penalty is not None:
        z = draw.penalised(z, slots.seen, filters.penalty)
    if filters.bias is not None:
        z = z + filters.bias[None]
    if filters.fewest is not None:
        stops = z.at[:, filters.stops].set(-jnp.inf)
        z = jnp.where((slots.drawn < filters.fewest)[:, None], stops, z)
    if filters.trie is not None:
        z = jnp.where(allowed(filters.trie, slots.node, filters.stops, z.shape[1]), z, -jnp.inf)
    if filters.temperature is None:
        token = draw.likeliest(z)
        return token, _logp(raw, token), jnp.zeros(len(token), jnp.float32)
    plain, z = z is raw, z / filters.temperature
    for keep, limit in ((draw.top_k, filters.top_k), (draw.top_p, filters.top_p), (draw.min_p, filters.min_p)):
        if limit is not None:
            plain, z = False, keep(z, limit)
    keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.drawn)
    token, drawn_logp = draw.draw(z, jax.vmap(jax.random.uniform)(keys))
    return token, drawn_logp if plain else _logp(raw / filters.temperature, token), drawn_logp


def _logp(z, token):
    """f32[C]: log softmax(z)[token]."""
    return jnp.take_along_axis(z, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(z, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _prepared(policy, params):
    return policy.prepared(params)


@functools.partial(jax.jit, static_argnums=range(5))
def _emptied(policy, rows, length, chunk, quantized):
    return policy.new_cache(rows, length, chunk=chunk, quantized=quantized)


@functools.partial(jax.jit, static_argnums=range(6))
def _new_slots(policy, rows, length, chunk, quantized, penalised):
    cache = policy.new_cache(rows, length, chunk=chunk, quantized=quantized)
    none, zero = jnp.full(rows, -1, jnp.int32), jnp.zeros(rows, jnp.int32)
    seen = jnp.zeros((rows, policy.config.vocab_size), bool) if penalised else None
    return Slots(cache, jax.random.split(jax.random.key(0), rows), zero, none, zero, zero, zero, seen)


@functools.partial(jax.jit, donate_argnums=0)
def _cleared(cache):
    return dataclasses.replace(cache, lengths=jnp.zeros_like(cache.lengths))


@functools.partial(jax.jit, donate_argnums=0)
def _freed(position, slots):
    return position.at[slots].set(-1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _prefill(policy, params, tokens, positions, cache):
    return policy.decode(params, tokens, positions, cache)[1]


@functools.partial(jax.jit, donate_argnums=0)
def _admit(slots, prefilled, key, ids, row, slot, token, position, most, seen):
    """Puts completions [ADMITTED] into `slot`, out of bounds for none, with what is read of their prompts in `row`."""
    put = lambda old, new: old.at[slot].set(new.astype(old.dtype), mode="drop")  # noqa: E731
    keys = jax.vmap(lambda index, number: jax.random.fold_in(jax.random.fold_in(key, index), number))(*ids)

    layers = tuple(_copied(old, new, row, slot) for old, new in zip(slots.cache.layers, prefilled.layers, strict=True))
    zero = jnp.zeros(len(slot), jnp.int32)
    return Slots(
        cache=Cache(layers, put(slots.cache.lengths, position)),
        keys=slots.keys.at[slot].set(keys, mode="drop"),
        token=put(slots.token, token),
        position=put(slots.position, position),
        drawn=put(slots.drawn, zero),
        most=put(slots.most, most),
        node=put(slots.node, zero),
        seen=None if seen is None else put(slots.seen, seen),
    )


def _copied(old: KV, new: KV, row, slot) -> KV:
    """Rows of one layer's KV, or of stacked layers', put into slots."""
    stack = (slice(None),) * (old.k.ndim - 4)
    return jax.tree.map(lambda old, new: old.at[(*stack, slot)].set(new[(*stack, row)], mode="drop"), old, new)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _block(policy, steps, params, filters, enough, slots):
    """Up to `steps` tokens of every slot; it ends once `enough` slots have ended, or all.

    Returns the slots and (steps done, int8[steps, C] 1 where a token ended a completion by a stop and 2 by its length,
    tokens, logps, drawn_logps [steps, C]).
    """
    C = len(slots.token)
    values = tuple(jnp.zeros((steps, C), kind) for kind in (jnp.int8, jnp.int32, jnp.float32, jnp.float32))
    head = policy.head(params)

    def go_on(state):
        n, slots, ended, _ = state
        return (n < steps) & (ended < enough) & (slots.position >= 0).any()

    def step(state):
        n, slots, ended, values = state
        active = slots.position >= 0
        hidden, cache = policy.decode(params, slots.token[:, None], slots.position[:, None], slots.cache)
        token, logp, drawn_logp = choose(filters, logits(hidden[:, -1], head), slots)
        drawn, node = slots.drawn + 1, slots.node
        stopped = (token[:, None] == filters.stops[None]).any(1)
        if filters.trie is not None:
            node, last = follow(filters.trie, node, token)
            stopped |= last
        end = jnp.where(active, jnp.where(stopped, 1, jnp.where(drawn >= slots.most, 2, 0)), 0).astype(jnp.int8)
        found = (end, token, logp, drawn_logp)
        values = tuple(jax.lax.dynamic_update_index_in_dim(v, x, n, 0) for v, x in zip(values, found, strict=True))
        seen = None if slots.seen is None else slots.seen.at[jnp.arange(C), token].set(True)
        position = jnp.where(active & (end == 0), slots.position + 1, -1)
        slots = Slots(cache, slots.keys, token, position, drawn, slots.most, node, seen)
        return n + 1, slots, ended + (end > 0).sum(dtype=jnp.int32), values

    n, slots, _, values = jax.lax.while_loop(go_on, step, (jnp.int32(0), slots, jnp.int32(0), values))
    return slots, (n, *values)
