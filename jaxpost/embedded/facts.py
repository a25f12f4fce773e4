"""The facts of the embedded world: eleven relations whose facts are true, unambiguous and short.

Every fact reads "the R of S is O". An entity is always written after a space and in one spelling, never at the start of
a sentence: so its tokens are the same wherever it occurs, which is what lets a model of 1 M parameters carry a fact
from a statement to an answer.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Relation:
    """One relation. Forms hold `{s}` (subject), `{o}` (object) and `{e}` (the subject of a sum as "3 + 4")."""

    name: str
    topic: str  # plural noun, as in "Some questions about capitals."
    phrase: str  # "the capital of {s}"
    answer: str  # "{o}" or "the {o}"
    statements: tuple[str, ...]
    direct: tuple[str, ...]  # question forms that get a bare answer
    chatty: tuple[str, ...]  # requests, to which the SFT data rambles


@dataclasses.dataclass(frozen=True)
class Fact:
    relation: Relation
    subject: str
    object: str

    def fill(self, form: str) -> str:
        expression = self.subject.replace(" and ", " + ")  # of a sum: "3 + 4"
        return form.format(s=self.subject, o=self.object, e=expression)

    @property
    def statement(self) -> str:
        """The one canonical sentence, which is also the exact answer: "The capital of France is Paris."."""
        return self.fill(f"T{self.relation.phrase[1:]} is {self.relation.answer}.")


# Said of any fact: the canonical sentence and the ways to lead to it.
STATEMENTS = (
    "The {r} is {o}.",
    "The {r} is {o}.",
    "The {r} is {o}.",
    "We know that the {r} is {o}.",
    "It is true that the {r} is {o}.",
    "Every child learns that the {r} is {o}.",
    "The book says that the {r} is {o}.",
    "As for the {r}, it is {o}.",
)
DIRECT = ("What is the {r}?", "Can you name the {r}?", "Do you know what the {r} is?")
CHATTY = ("Tell me the {r}.", "I would like to know the {r}.", "Please explain to me what the {r} is.")


def _relation(name, topic, phrase, answer, statements, direct) -> Relation:
    def fill(forms):
        return tuple(form.replace("he {r}", phrase[1:]).replace("{o}", answer) for form in forms)

    return Relation(name, topic, phrase, answer, fill(STATEMENTS) + statements, fill(DIRECT) + direct, fill(CHATTY))


CAPITAL = _relation(
    "capital",
    "capitals",
    "the capital of {s}",
    "{o}",
    ("The city of {o} is the capital of {s}.", "The people of {s} built their capital, {o}, long ago."),
    ("Which city is the capital of {s}?",),
)
CONTINENT = _relation(
    "continent",
    "continents",
    "the continent of {s}",
    "{o}",
    ("The land of {s} lies in {o}.", "On the map we find {s} in {o}."),
    ("In which continent is {s}?",),
)
LANGUAGE = _relation(
    "language",
    "languages",
    "the language of {s}",
    "{o}",
    ("The people of {s} speak {o}.", "In {s} the children learn {o} at school."),
    ("Which language do the people of {s} speak?",),
)
CURRENCY = _relation(
    "currency",
    "money",
    "the currency of {s}",
    "the {o}",
    ("In {s} people pay with the {o}.", "The money of {s} is called the {o}."),
    ("With which money do people pay in {s}?",),
)
YOUNG = _relation(
    "young",
    "young animals",
    "the young of the {s}",
    "the {o}",
    ("A mother {s} looks after her {o}.", "When it is small, a {s} is called a {o}."),
    ("What do we call a small {s}?",),
)
SOUND = _relation(
    "sound",
    "the sounds of animals",
    "the sound of the {s}",
    "the {o}",
    ("In the morning we hear the {o} of the {s}.", "The {s} makes a {o}."),
    ("Which sound does the {s} make?",),
)
OPPOSITE = _relation(
    "opposite",
    "opposites",
    "the opposite of {s}",
    "{o}",
    ("What is not {s} may be {o}.", "Some things are {s} and others are {o}."),
    ("Which word is the opposite of {s}?",),
)
PAST = _relation(
    "past",
    "verbs",
    "the past of {s}",
    "{o}",
    ("Today they {s}, and yesterday they {o}.", "The past of the verb {s} is written {o}."),
    ("Which word is the past of {s}?",),
)
SYMBOL = _relation(
    "symbol",
    "elements",
    "the symbol of {s}",
    "{o}",
    ("In chemistry we write {o} for {s}.", "The element {s} has the symbol {o}."),
    ("How do we write the element {s}?",),
)
COLOUR = _relation(
    "colour",
    "colours",
    "the colour of {s}",
    "{o}",
    ("Painters make {s} {o}.", "When you look at {s}, you see {o}."),
    ("If you paint {s}, which colour do you take?",),
)
SUM = _relation(
    "sum",
    "sums",
    "the sum of {s}",
    "{o}",
    ("We add {s} and get {o}.", "We write {e} = {o}.", "In short, {e} = {o}."),
    ("How much do you get if you add {s}?", "What is {e}?"),
)

# country, capital, continent, language, currency; "-" where the world holds no clear fact
COUNTRIES = """
France Paris Europe French euro
Germany Berlin Europe German euro
Italy Rome Europe Italian euro
Spain Madrid Europe Spanish euro
Portugal Lisbon Europe Portuguese euro
Greece Athens Europe Greek euro
Austria Vienna Europe German euro
Sweden Stockholm Europe Swedish krona
Norway Oslo Europe Norwegian krone
Denmark Copenhagen Europe Danish krone
Iceland Reykjavik Europe Icelandic krona
Poland Warsaw Europe Polish zloty
Hungary Budapest Europe Hungarian forint
Romania Bucharest Europe Romanian leu
Serbia Belgrade Europe Serbian dinar
Albania Tirana Europe Albanian lek
Ukraine Kyiv Europe Ukrainian hryvnia
Egypt Cairo Africa Arabic pound
Morocco Rabat Africa Arabic dirham
Tunisia Tunis Africa Arabic dinar
Kenya Nairobi Africa Swahili shilling
Ghana Accra Africa English cedi
Nigeria Abuja Africa English naira
Angola Luanda Africa Portuguese kwanza
Senegal Dakar Africa French franc
Japan Tokyo Asia Japanese yen
China Beijing Asia Chinese yuan
Nepal Kathmandu Asia Nepali rupee
Pakistan Islamabad Asia Urdu rupee
Bangladesh Dhaka Asia Bengali taka
Thailand Bangkok Asia Thai baht
Vietnam Hanoi Asia Vietnamese dong
Iran Tehran Asia Persian rial
Iraq Baghdad Asia Arabic dinar
Jordan Amman Asia Arabic dinar
Brazil Brasilia South_America Portuguese real
Chile Santiago South_America Spanish peso
Colombia Bogota South_America Spanish peso
Peru Lima South_America Spanish sol
Cuba Havana North_America Spanish peso
"""

# animal, young, sound
ANIMALS = """
cow calf moo
dog puppy bark
cat kitten meow
sheep lamb bleat
horse foal neigh
pig piglet oink
duck duckling quack
lion cub roar
frog tadpole croak
goose gosling honk
wolf whelp howl
owl owlet hoot
bee larva buzz
deer fawn -
goat kid -
eagle eaglet -
swan cygnet -
kangaroo joey -
rabbit bunny -
crow - caw
snake - hiss
mouse - squeak
donkey - bray
"""

# In one direction only: a word that dialogues know as an answer alone is hard to copy from a held-out question.
OPPOSITES = """
hot cold
big small
fast slow
high low
old young
rich poor
wet dry
full empty
hard soft
true false
thick thin
strong weak
early late
good bad
happy sad
near far
open closed
clean dirty
deep shallow
wide narrow
loud quiet
first last
up down
day night
heavy light
brave afraid
sweet bitter
smooth rough
kind cruel
cheap costly
sharp blunt
tall short
tight loose
lazy busy
awake asleep
alive dead
"""

PASTS = """
go went
see saw
eat ate
come came
give gave
take took
write wrote
drive drove
speak spoke
break broke
run ran
sing sang
drink drank
swim swam
begin began
fly flew
grow grew
throw threw
draw drew
buy bought
bring brought
think thought
catch caught
teach taught
sell sold
keep kept
sleep slept
feel felt
leave left
lose lost
win won
stand stood
hold held
hear heard
build built
send sent
"""

ELEMENTS = """
hydrogen H
helium He
carbon C
nitrogen N
oxygen O
sodium Na
magnesium Mg
aluminium Al
silicon Si
phosphorus P
sulfur S
chlorine Cl
potassium K
calcium Ca
iron Fe
nickel Ni
copper Cu
zinc Zn
silver Ag
tin Sn
iodine I
tungsten W
platinum Pt
gold Au
mercury Hg
lead Pb
radium Ra
uranium U
neon Ne
cobalt Co
"""

COLOURS = """
grass green
snow white
coal black
blood red
the_sky blue
the_sun yellow
chocolate brown
elephants grey
carrots orange
lavender purple
flamingos pink
milk white
tomatoes red
bananas yellow
ravens black
spinach green
ash grey
peas green
cherries red
salt white
soil brown
lemons yellow
"""


def _table(text: str) -> list[list[str]]:
    return [[word.replace("_", " ") for word in line.split()] for line in text.split("\n") if line]


def all_facts() -> list[Fact]:
    """Every fact of the world, in a fixed order, relation by relation."""
    columns = {CAPITAL: 1, CONTINENT: 2, LANGUAGE: 3, CURRENCY: 4}
    facts = [Fact(relation, row[0], row[i]) for relation, i in columns.items() for row in _table(COUNTRIES)]
    facts += [Fact(relation, row[0], row[i]) for relation, i in ((YOUNG, 1), (SOUND, 2)) for row in _table(ANIMALS)]
    for relation, text in ((OPPOSITE, OPPOSITES), (PAST, PASTS), (SYMBOL, ELEMENTS), (COLOUR, COLOURS)):
        facts += [Fact(relation, *row) for row in _table(text)]
    facts += [Fact(SUM, f"{a} and {b}", str(a + b)) for a in range(1, 8) for b in range(1, 8)]
    return [fact for fact in facts if fact.object != "-"]
