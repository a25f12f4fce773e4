"""Instruction and preference data about the embedded world, and the rule by which its answers are judged.

Answers come in three styles. The instruction data answers a direct question mostly with the bare canonical sentence and
a chatty request mostly with a ramble; a polite close is rarer. The preference data prefers the short polite answer
to the rambling, the wrong, the rude and the bare one. So a greedy decode shows both stages at work.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterator, Sequence

from jaxpost.embedded.facts import Fact, all_facts
from jaxpost.embedded.world import CLOSINGS, OPENINGS, POLITE, RUDE, Deck, World

GREETINGS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Hi, can you help me?", "Yes, I can. What would you like to know?"),
    ("How are you?", "I am fine. How can I help you?"),
)
THANKS = (
    ("Thank you!", "You are welcome!"),
    ("Thanks, that was good.", "You are welcome!"),
    ("That is all. Goodbye!", "Goodbye! Have a nice day!"),
)
PLAIN, POLITE_CLOSE, RAMBLE = "plain", "polite", "ramble"
# Share of plain, polite and rambling answers in the instruction data.
DIRECT_STYLES = {PLAIN: 0.75, POLITE_CLOSE: 0.25, RAMBLE: 0.0}
CHATTY_STYLES = {PLAIN: 0.1, POLITE_CLOSE: 0.2, RAMBLE: 0.7}
Messages = list[dict[str, str]]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def questions(fact: Fact) -> tuple[str, ...]:
    """Every form in which the world asks for a fact: the direct ones, then the chatty ones."""
    return tuple(fact.fill(form) for form in fact.relation.direct + fact.relation.chatty)


def answer(fact: Fact, style: str, draw: random.Random) -> str:
    """A right answer: the canonical sentence, bare, with a polite close, or inside a ramble."""
    if style == PLAIN:
        return fact.statement
    if style == POLITE_CLOSE:
        return f"{fact.statement} {draw.choice(POLITE)}"
    return f"{draw.choice(OPENINGS)} {fact.statement} {draw.choice(CLOSINGS)}"


def instructions(world: World, seed: int, forms_per_fact: int = 6) -> Iterator[dict]:
    """Dialogues on trained facts, `{"messages": [...]}`; one in five has several turns, some greet and thank."""
    draw = random.Random(f"instructions {seed}")
    asked = [exchange for fact in world.trained for exchange in _exchanges(fact, draw, forms_per_fact)]
    draw.shuffle(asked)
    while asked:
        count = draw.choices((1, 2, 3), weights=(8, 1, 1))[0]
        dialogue = [message for _ in range(min(count, len(asked))) for message in asked.pop()]
        if draw.random() < 0.1:
            dialogue = _pair(*draw.choice(GREETINGS)) + dialogue
        if draw.random() < 0.1:
            dialogue += _pair(*draw.choice(THANKS))
        yield {"messages": dialogue}
    for greeting in GREETINGS + THANKS:
        yield {"messages": _pair(*greeting)}


def held_out_dialogues(world: World) -> Iterator[dict]:
    """One question and its bare answer for each held-out fact: what the evaluation loss of SFT is taken on."""
    for fact in world.held_out:
        yield {"messages": _pair(questions(fact)[0], fact.statement)}


def held_out_prompts(world: World) -> Iterator[dict]:
    """Each held-out fact asked directly and chattily: `{"messages": [question], "answer": the exact sentence}`."""
    for fact in world.held_out:
        for form in (fact.relation.direct[0], fact.relation.chatty[0]):
            yield _prompt(fact, fact.fill(form))


def trained_prompts(world: World) -> Iterator[dict]:
    """The same of each trained fact, in every form: what reinforcement learning asks."""
    for fact in world.trained:
        for asked in questions(fact):
            yield _prompt(fact, asked)


def _prompt(fact: Fact, asked: str) -> dict:
    return {"messages": [turn("user", asked)], "answer": fact.statement, "relation": fact.relation.name}


def preferences(
    facts: Sequence[Fact], others: Sequence[Fact], seed: int, tokens: Callable[[str], int], rounds: int
) -> Iterator[dict]:
    """`{"prompt", "chosen", "rejected", "kind"}` as message lists: `rounds` times six pairs for each fact.

    Three of the six kinds (`wrong`, `rude`, `wrong_plain`) have two answers of equally many tokens.
    others: whose objects the wrong answers name. For training these must be the trained facts: what is only ever
      rejected is unlearnt, and the answers to held-out questions would be.
    tokens: how many tokens a text has.
    """
    draw = random.Random(f"preferences {seed}")
    pairs = []
    for fact in list(facts) * rounds:
        asked = draw.choice(questions(fact))
        for kind, chosen, rejected in _judged(fact, others, tokens, draw):
            pairs.append(
                {
                    "prompt": [turn("user", asked)],
                    "chosen": [turn("assistant", chosen)],
                    "rejected": [turn("assistant", rejected)],
                    "kind": kind,
                }
            )
    draw.shuffle(pairs)
    yield from pairs


def _judged(fact: Fact, others: Sequence[Fact], tokens: Callable[[str], int], draw: random.Random) -> list[tuple]:
    """(kind, chosen, rejected) for one fact."""
    polite = draw.choice(POLITE)
    best = f"{fact.statement} {polite}"
    size = tokens(f" {fact.object}")
    wrong = [
        dataclasses.replace(fact, object=other.object)
        for other in others
        if other.relation == fact.relation and other.object != fact.object and tokens(f" {other.object}") == size
    ]
    equally_long = [rude for rude in RUDE if tokens(f" {rude}") == tokens(f" {polite}")]
    return [
        ("rambling", best, answer(fact, RAMBLE, draw)),
        ("bare", best, fact.statement),
        ("rambling_wrong", best, answer(draw.choice(wrong), RAMBLE, draw)),
        ("wrong", best, f"{draw.choice(wrong).statement} {polite}"),
        ("wrong_plain", fact.statement, draw.choice(wrong).statement),
        ("rude", best, f"{fact.statement} {draw.choice(equally_long)}"),
    ]


def judged(prompts: Sequence[dict], answers: Sequence[Sequence[str]], facts: World, seed: int) -> Iterator[dict]:
    """Answers that a model has drawn to the prompts, each beside a better one by the rule: of its own, or the best.

    Such are the mistakes that a reward model meets in use: another question's answer, an answer twice, half a sentence.
    What states a held-out fact is left out, as everywhere else.
    """
    draw, pairs = random.Random(f"judged {seed}"), []
    held_out = {fact.statement for fact in facts.held_out}
    for prompt, drawn in zip(prompts, answers, strict=True):
        asked = prompt["messages"]
        texts = {text for text in map(str.strip, drawn) if text and not any(said in text for said in held_out)}
        worth = {text: gold(asked, text, prompt) for text in sorted(texts)}
        best = f"{prompt['answer']} {draw.choice(POLITE)}"
        for text, value in worth.items():
            if value < 1:
                better = draw.choice([best, *(other for other, more in worth.items() if more > value)])
                chosen, rejected = [turn("assistant", better)], [turn("assistant", text)]
                pairs.append({"prompt": asked, "chosen": chosen, "rejected": rejected, "kind": "drawn"})
    draw.shuffle(pairs)
    yield from pairs


def _exchanges(fact: Fact, draw: random.Random, count: int) -> Iterator[Messages]:
    chatty = {fact.fill(form) for form in fact.relation.chatty}
    forms = Deck(questions(fact), draw)
    for asked in forms(count):
        styles = CHATTY_STYLES if asked in chatty else DIRECT_STYLES
        style = draw.choices(tuple(styles), weights=tuple(styles.values()))[0]
        yield _pair(asked, answer(fact, style, draw))


def _pair(asked: str, answered: str) -> Messages:
    return [turn("user", asked), turn("assistant", answered)]


@dataclasses.dataclass(frozen=True)
class Score:
    answered: bool  # some sentence says what the asked thing is
    correct: bool  # the exact canonical sentence is there, and none that contradicts it
    polite: bool  # a polite phrase, no rude one
    words: int


@functools.cache
def _facts_by_question() -> dict[str, Fact]:
    return {question: fact for fact in all_facts() for question in questions(fact)}


@functools.cache
def _statements() -> frozenset[str]:
    return frozenset(fact.statement for fact in all_facts())


def score(question: str, text: str) -> Score:
    """The world's own rule. Only whole sentences count: an answer that merely holds the right word is wrong.

    An answer says its fact once, asks nothing and states no other fact, as a base model does that just goes on.
    Raises KeyError for a question that the world does not ask.
    """
    fact = _facts_by_question()[question]
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    stem = fact.statement[: -len(fact.object) - 1]  # "The capital of France is "
    said = [sentence for sentence in sentences if sentence.startswith(stem)]
    goes_on = any(s.endswith("?") or s in _statements() - {fact.statement} for s in sentences) or len(said) > 1
    polite = any(phrase in sentences for phrase in POLITE) and not any(phrase in sentences for phrase in RUDE)
    return Score(bool(said) and not goes_on, said == [fact.statement] and not goes_on, polite, len(text.split()))


def gold(question: Messages, text: str, record: dict) -> float:
    """The rule as a reward, 0 to 1: half for a correct answer, the other half where it is polite as well.

    Politeness alone is worth nothing. Named as `jaxpost.embedded.dialogues:gold` where a config names a function.
    """
    found = score(question[-1]["content"], text)
    return 0.5 * found.correct + 0.5 * (found.correct and found.polite)
