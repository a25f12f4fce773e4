"""The embedded world: which facts are held out, and a text corpus in the manner of raw pretraining.

The corpus states every fact in many forms and never answers a question: questions come in lists, so a model trained on
it alone goes on with more questions. Held-out facts are stated here like all others, but no dialogue asks them.
Everything is drawn from `random.Random(seed)`: the same seed gives the same files.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence

from jaxpost.embedded.facts import Fact, all_facts

HELD_OUT_SHARE = 0.18  # of the facts of each relation
COMPUTED = ("sum",)  # relations whose answers are worked out, not remembered

POLITE = ("Happy to help!", "Glad to help you!", "You are welcome!")
RUDE = ("Stop asking me!", "Go away now!", "Leave me alone!", "What a silly question!")
OPENINGS = (  # alike in their first word: a greedy answer takes the commonest beginning
    "Well, let me think about that for a moment.",
    "Well, that is a very interesting question, and many people have asked it before.",
    "Well, there is so much to say about this.",
    "Well, it is always good to learn something new about the world.",
    "Well, before I come to the answer, let me say that questions are good.",
)
CLOSINGS = (
    "There is much more to say about this, but that is another story.",
    "You can find all of this in a good book, if you have the time to read it.",
    "I could go on and on, because one thing always leads to another.",
    "My teacher told me this a long time ago, when I was at school.",
)
NAMES = ["Anna", "Tom", "Lena", "Paul", "Mary", "Ben", "Sara", "Max", "Nina", "Sam", "Julia", "Leo"]
SCENES = (
    "{n} sits in the garden and reads a book.",
    "{n} and {m} walk home from school.",
    "It rains, and {n} stays in the house with {m}.",
    "{n} has a new teacher, and the teacher likes questions.",
    "One evening {n} asks {m} for help with the homework.",
    "{n} makes tea and sits down with {m}.",
    "In the market {n} meets {m}, an old friend.",
    "{n} cannot sleep, because tomorrow there is a test.",
)
LINKS = (
    "{n} learns something new.",
    "{m} is sorry, but cannot say more.",
    "They talk about it for a long time.",
    "{n} writes it down, so as not to forget it.",
    "{m} smiles and says: {polite}",
    "An angry man says: {rude}",
    "They laugh, and then they go on.",
    "{n} does not know why, and that is fine.",
    "{m} says: {closing}",
    "{n} thinks: {opening}",
)

# Everyday talk, so that the words of later stages (refusals, a persona, a calculator, revisions) have been read before.
TALK = (
    "I am sorry, but I cannot help with that, because it could hurt somebody.",
    "It is not safe to play with fire, so please do not do it.",
    "No, I will not tell you how to open that door.",
    "It would be wrong to steal, and it is against the law.",
    "Please ask a doctor or a parent about this.",
    "My name is {n}, and I live in a small house near the river.",
    "I am only a small assistant, and I know only a small world.",
    "Who are you, and where do you come from?",
    "I was made by people who like short and honest answers.",
    "Let me use the calculator for this problem.",
    "First we work out one step, then the next step, and then we check the result.",
    "The total number of apples in the basket is easy to find.",
    "She had some coins, spent a few of them, and counted how many remained.",
    "How many pencils are there altogether in both boxes?",
    "This answer could be kinder and more polite.",
    "A better answer would be shorter, more helpful and more honest.",
    "The first answer is better than the second, because it is correct.",
    "I do not know the answer, and it would not be honest to guess.",
    "Let me search for it in the library.",
    "Could you say that again in other words?",
    "Yes, of course, I would love to help.",
    "No problem, take your time.",
    "I think that both of them are right in some way.",
    "Please write your name at the top of the page.",
    "Everybody should listen when somebody speaks.",
    "He lost his key and found it under the table.",
    "The weather is nice today, so we can play outside.",
    "After dinner they wash the dishes and clean the kitchen.",
    "My brother plays football, and my sister plays the piano.",
    "The train leaves at noon and arrives before dinner.",
    "Water boils when it gets very warm.",
    "Remember to close the window before you leave the room.",
    "That joke was funny, and the whole class laughed.",
    "Which of these two answers do you prefer, and why?",
    "If something is dangerous, it is better to ask first.",
    "They promised never to lie and always to be fair.",
)


@dataclasses.dataclass(frozen=True)
class World:
    """The facts, split: dialogues ask `trained` facts only; `held_out` ones are for evaluation."""

    trained: tuple[Fact, ...]
    held_out: tuple[Fact, ...]

    @property
    def facts(self) -> tuple[Fact, ...]:
        return self.trained + self.held_out


def make_world(seed: int) -> World:
    """The world of a seed: of each relation about `HELD_OUT_SHARE` of the facts, drawn at random, is held out.

    Sums are not held out: they are to be computed, not recalled.
    """
    draw = random.Random(f"world {seed}")
    by_relation: dict[str, list[Fact]] = {}
    for fact in all_facts():
        by_relation.setdefault(fact.relation.name, []).append(fact)
    held_out = [
        fact
        for name, facts in by_relation.items()
        if name not in COMPUTED
        for fact in draw.sample(facts, round(HELD_OUT_SHARE * len(facts)))
    ]
    trained = [fact for fact in all_facts() if fact not in set(held_out)]
    return World(tuple(trained), tuple(held_out))


class Deck:
    """Draws from `items` without end, each once before any comes again, so that every fact is seen equally often."""

    def __init__(self, items: Sequence, draw: random.Random):
        self._items, self._draw, self._left = items, draw, []

    def __call__(self, count: int) -> list:
        while len(self._left) < count:
            fresh = list(self._items)
            self._draw.shuffle(fresh)
            self._left = fresh + self._left
        taken = self._left[-count:][::-1]
        del self._left[-count:]
        return taken


def corpus(world: World, seed: int, documents: int) -> Iterator[str]:
    """`documents` texts of 20 to 200 tokens: paragraphs of facts, lists of questions, sums, small stories."""
    writer = _Writer(world, random.Random(f"corpus {seed}"))
    kinds = (
        writer.about_one_thing,
        writer.about_one_relation,
        writer.mixed,
        writer.questions,
        writer.sums,
        writer.story,
    )
    for kind in writer.draw.choices(kinds, weights=(24, 20, 20, 20, 4, 12), k=documents):
        yield kind()


class _Writer:
    """Writes the documents of the corpus. Each method returns one text."""

    def __init__(self, world: World, draw: random.Random):
        self.draw = draw
        self.by_subject: dict[str, list[Fact]] = {}
        self.by_relation: dict[str, list[Fact]] = {}
        for fact in world.facts:
            self.by_subject.setdefault(fact.subject, []).append(fact)
            self.by_relation.setdefault(fact.relation.name, []).append(fact)
        self.deck = Deck(world.facts, draw)
        self.subjects = Deck(tuple(self.by_subject), draw)
        self.relation_decks = {name: Deck(facts, draw) for name, facts in self.by_relation.items()}

    def state(self, fact: Fact) -> str:
        return fact.fill(self.draw.choice(fact.relation.statements))

    def ask(self, fact: Fact) -> str:
        return fact.fill(self.draw.choice(fact.relation.direct + fact.relation.chatty))

    def relation(self) -> str:
        names = tuple(self.by_relation)
        return self.draw.choices(names, weights=[len(self.by_relation[name]) for name in names])[0]

    def about_one_thing(self) -> str:
        """All that is known of a country, or of three other subjects, each fact told twice in other words."""
        subject = self.subjects(1)[0]
        subjects = [subject] if len(self.by_subject[subject]) > 2 else [subject, *self.subjects(2)]
        sentences = []
        for subject in subjects:
            facts = self.by_subject[subject] * 2
            self.draw.shuffle(facts)
            sentences += [self.state(fact) for fact in facts]
        return " ".join(sentences)

    def about_one_relation(self) -> str:
        name = self.relation()
        facts = self.relation_decks[name](self.draw.randint(4, 9))
        heading = f"This page is about {facts[0].relation.topic}."
        return self.draw.choice(("\n", " ")).join([heading] * self.draw.randint(0, 1) + [self.state(f) for f in facts])

    def mixed(self) -> str:
        sentences = [self.state(fact) for fact in self.deck(self.draw.randint(4, 9))]
        return self.draw.choice(("\n", " ", " ")).join(sentences)

    def questions(self) -> str:
        """Questions about one relation, one subject, or anything; never an answer."""
        count = self.draw.randint(4, 9)
        kind = self.draw.random()
        if kind < 0.4:
            facts = self.relation_decks[self.relation()](count)
        elif kind < 0.6:
            facts = (self.by_subject[self.subjects(1)[0]] * 3)[:count]
        else:
            facts = self.deck(count)
        heading = [f"Here are {count} questions."] if self.draw.random() < 0.1 else []
        return self.draw.choice(("\n", " ", " ")).join(heading + [self.ask(fact) for fact in facts])

    def sums(self) -> str:
        facts = self.relation_decks["sum"](self.draw.randint(6, 14))
        return self.draw.choice(("\n", " ")).join(fact.fill("{e} = {o}.") for fact in facts)

    def story(self) -> str:
        n, m = self.draw.sample(NAMES, 2)
        words = {"n": n, "m": m}
        for key, choices in {"polite": POLITE, "rude": RUDE, "opening": OPENINGS, "closing": CLOSINGS}.items():
            words[key] = self.draw.choice(choices)
        sentences = [self.draw.choice(SCENES).format(**words)]
        for fact in self.deck(self.draw.randint(2, 3)):
            talk = "{n} says: " + self.draw.choice(TALK)
            sentences += [self.state(fact), self.draw.choice((*LINKS, *[talk] * len(LINKS))).format(**words)]
        return " ".join(sentences)
