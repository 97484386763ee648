"""The demo's domains: four small skills and one worthless pile of random letters.

Every document is one item, a prompt directly followed by its answer. The prompts of benchmark items are
kept out of the corpora, except in `facts`: what nobody ever wrote down cannot be known, so there the
search and the test ask for different facts, and all of them are in the corpus.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

ALPHABET = string.ascii_lowercase + string.digits + " .+-=>()"

ADJECTIVES = "old young small big quiet clever lazy brave tired happy".split()
NOUNS = "cat dog bird horse farmer teacher king robot child pilot sailor doctor painter baker singer wolf".split()
PLACES = "near behind above with without before".split()
VERBS = "sleep run sing jump read work swim laugh talk paint cook fall wait grow play rest".split()
CITIES = "oslo lima cairo paris delhi tokyo quito dakar perth miami turin accra".split()
JOBS = "baker pilot nurse judge miner actor tailor farmer singer lawyer doctor sailor".split()
FRUITS = "plums figs pears limes dates grapes kiwis mangos melons apples lemons quinces".split()

CODE_FUNCTIONS: dict[str, Callable[[str], str]] = {
    "rev": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),
    "swap": lambda s: s[-1] + s[1:-1] + s[0],
    "rot": lambda s: s[1:] + s[0],
}


@dataclass(frozen=True)
class Item:
    """A prompt and the text that should follow it."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class World:
    """What is true in the demo: who lives where, and which noun goes with which verb. Fixed by the seed."""

    def __init__(self, seed: int, *, people: int) -> None:
        rng = random.Random(f"world {seed}")
        self.facts = [
            Item(f"{name} {relation}", f" {rng.choice(values)}.")
            for name in _names(people, rng)
            for relation, values in (("lives in", CITIES), ("works as a", JOBS), ("likes", FRUITS))
        ]
        self.verb_of = dict(zip(NOUNS, rng.sample(VERBS, len(VERBS)), strict=True))

    def math(self, rng: random.Random) -> Item:
        a, b = rng.randrange(100), rng.randrange(100)
        if rng.random() < 0.5:
            return Item(f"{a}+{b}=", str(a + b))
        return Item(f"{max(a, b)}-{min(a, b)}=", str(abs(a - b)))

    def code(self, rng: random.Random) -> Item:
        name = rng.choice(list(CODE_FUNCTIONS))
        word = "".join(rng.sample(string.ascii_lowercase[:10], 5))
        return Item(f"{name}({word})->", CODE_FUNCTIONS[name](word))

    def fact(self, rng: random.Random) -> Item:
        return rng.choice(self.facts)

    def language(self, rng: random.Random) -> Item:
        """The verb belongs to the first noun and agrees with it in number, whatever stands between."""
        (noun, other), (one, other_one) = rng.sample(NOUNS, 2), (rng.random() < 0.5, rng.random() < 0.5)
        subject = f"the {rng.choice(ADJECTIVES)} {noun}{'' if one else 's'}"
        place = f"{rng.choice(PLACES)} the {other}{'' if other_one else 's'}"
        return Item(f"{subject} {place}", f" {self.verb_of[noun]}{'s' if one else ''}.")

    def spam(self, rng: random.Random) -> Item:
        words = ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(4))
        return Item(" ".join(words), ".")

    def draw(self, domain: str, rng: random.Random) -> Item:
        draw = {"math": self.math, "code": self.code, "facts": self.fact, "language": self.language,
                "spam": self.spam}[domain]
        return draw(rng)


DOMAINS = ("math", "code", "facts", "language", "spam")
CAPABILITIES = ("math", "code", "facts", "language")


@dataclass(frozen=True)
class Corpora:
    """documents[domain]: training texts. search[capability], test[capability]: disjoint benchmark items."""

    documents: dict[str, list[str]]
    search: dict[str, list[Item]]
    test: dict[str, list[Item]]


def make_corpora(seed: int, *, documents: int, items: int, people: int) -> Corpora:
    """The same corpora for the same arguments, on every machine.

    documents: training documents of each domain. items: benchmark items of each capability, for the
    search and once more for the test. people: the size of the world; three facts are known of each.
    """
    world = World(seed, people=people)
    search: dict[str, list[Item]] = {}
    test: dict[str, list[Item]] = {}
    for capability in CAPABILITIES:
        rng = random.Random(f"items {capability} {seed}")
        held_out = _distinct(lambda c=capability, r=rng: world.draw(c, r), 2 * items)
        search[capability], test[capability] = held_out[:items], held_out[items:]
    texts = {}
    for domain in DOMAINS:
        hidden = set() if domain in ("facts", "spam") else {i.prompt for i in search[domain] + test[domain]}
        rng = random.Random(f"corpus {domain} {seed}")
        drawn = (world.draw(domain, rng) for _ in iter(int, 1))
        texts[domain] = _take((item.text for item in drawn if item.prompt not in hidden), documents)
    return Corpora(texts, search, test)


def _take(texts: Iterator[str], count: int) -> list[str]:
    return [text for text, _ in zip(texts, range(count), strict=False)]


def _distinct(draw: Callable[[], Item], count: int) -> list[Item]:
    """`count` items with different prompts, in the order in which they were drawn."""
    items: dict[str, Item] = {}
    while len(items) < count:
        item = draw()
        items.setdefault(item.prompt, item)
    return list(items.values())


def _names(count: int, rng: random.Random) -> Sequence[str]:
    """Distinct invented names of three syllables, such as `zorina`."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))] = None
    return list(names)
