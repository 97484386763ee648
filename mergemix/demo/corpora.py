"""The demo's domains: four small skills and one worthless pile of random letters.

Every document is one item, a prompt directly followed by its answer. The prompts of benchmark items are
kept out of the corpora, except in `facts`: what nobody ever wrote down cannot be known, so there the
search and the test ask for different facts, and all of them are in the corpus.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

ALPHABET = string.ascii_lowercase + string.digits + " .+-=>()"

PLACES = ("near", "behind", "above", "with", "without", "before")
VERB_OF = {  # what each noun does
    "cat": "sleep", "dog": "run", "bird": "sing", "horse": "jump", "farmer": "work", "teacher": "read",
    "king": "rest", "robot": "talk", "child": "play", "pilot": "wait", "sailor": "swim", "doctor": "walk",
    "painter": "draw", "baker": "cook", "singer": "laugh", "hunter": "hide", "lion": "roar", "frog": "hop",
    "snake": "bite", "clown": "joke",
}  # fmt: skip
NOUNS = tuple(VERB_OF)
CITIES = (
    "oslo",
    "lima",
    "cairo",
    "paris",
    "delhi",
    "tokyo",
    "quito",
    "dakar",
    "perth",
    "miami",
    "turin",
    "accra",
)
JOBS = (
    "baker",
    "pilot",
    "nurse",
    "judge",
    "miner",
    "actor",
    "tailor",
    "farmer",
    "singer",
    "lawyer",
    "doctor",
    "sailor",
)
FRUITS = (
    "plums",
    "figs",
    "pears",
    "limes",
    "dates",
    "grapes",
    "kiwis",
    "mangos",
    "melons",
    "apples",
    "lemons",
    "nuts",
)

CODE_FUNCTIONS: dict[str, Callable[[str], str]] = {
    "rev": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),
    "swap": lambda s: s[-1] + s[1:-1] + s[0],
    "rot": lambda s: s[1:] + s[0],
}


DOMAINS = ("math", "code", "facts", "language", "spam")
CAPABILITIES = ("math", "code", "facts", "language")  # nothing asks for spam


@dataclass(frozen=True)
class Item:
    """A prompt and the text that should follow it."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class World:
    """What is true in the demo (who lives where, works as what, likes which fruit), and items drawn from it.

    Fixed by the seed; `people` people of whom three facts each are known.
    """

    def __init__(self, seed: int, *, people: int) -> None:
        rng = random.Random(f"world {seed}")
        relations = (("lives in", CITIES), ("works as a", JOBS), ("likes", FRUITS))
        self.known = [
            Item(f"{name} {relation}", f" {rng.choice(values)}.")
            for name in _names(people, rng)
            for relation, values in relations
        ]

    def draw(self, domain: str, rng: random.Random) -> Item:
        item: Item = getattr(self, domain)(rng)
        return item

    def math(self, rng: random.Random) -> Item:
        a, b = rng.randrange(100), rng.randrange(100)
        if rng.random() < 0.5:
            return Item(f"{a}+{b}=", str(a + b))
        return Item(f"{max(a, b)}-{min(a, b)}=", str(abs(a - b)))

    def code(self, rng: random.Random) -> Item:
        name, function = rng.choice(list(CODE_FUNCTIONS.items()))
        word = "".join(rng.sample("abcdefghij", 4))
        return Item(f"{name}({word})->", function(word))

    def facts(self, rng: random.Random) -> Item:
        return rng.choice(self.known)

    def language(self, rng: random.Random) -> Item:
        """The verb belongs to the first noun and agrees with it in number, whatever stands between."""
        noun, other = rng.sample(NOUNS, 2)
        plural, other_plural = rng.random() < 0.5, rng.random() < 0.5
        subject, place = f"the {noun}{'s' * plural}", f"the {other}{'s' * other_plural}"
        return Item(f"{subject} {rng.choice(PLACES)} {place}", f" {VERB_OF[noun]}{'s' * (not plural)}.")

    def spam(self, rng: random.Random) -> Item:
        words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(4)]
        return Item(" ".join(words), ".")


@dataclass(frozen=True)
class Corpora:
    """documents[domain]: training texts. search[capability], test[capability]: disjoint benchmark items."""

    documents: dict[str, list[str]]
    search: dict[str, list[Item]]
    test: dict[str, list[Item]]


def make_corpora(seed: int, *, documents: int, items: int, people: int) -> Corpora:
    """The same corpora for the same arguments, on every machine.

    documents: training documents of each domain. items: benchmark items of each capability for the search, and
    as many again for the test; of facts, half of those known if that is fewer. people: see World.
    """
    world = World(seed, people=people)
    held_out = {capability: _held_out(world, capability, seed, 2 * items) for capability in CAPABILITIES}
    return Corpora(
        documents={domain: _documents(world, domain, seed, documents, held_out) for domain in DOMAINS},
        search={capability: drawn[0::2] for capability, drawn in held_out.items()},
        test={capability: drawn[1::2] for capability, drawn in held_out.items()},
    )


def _held_out(world: World, capability: str, seed: int, count: int) -> list[Item]:
    """`count` items with different prompts; of facts, as many as are known."""
    rng = random.Random(f"items {capability} {seed}")
    if capability == "facts":
        return rng.sample(world.known, min(count, len(world.known)))
    items: dict[str, Item] = {}
    while len(items) < count:
        item = world.draw(capability, rng)
        items.setdefault(item.prompt, item)
    return list(items.values())


def _documents(
    world: World, domain: str, seed: int, count: int, held_out: Mapping[str, Sequence[Item]]
) -> list[str]:
    """`count` texts, none of them with a held-out prompt (but for facts: see the top of this file)."""
    rng = random.Random(f"documents {domain} {seed}")
    hidden = {item.prompt for item in held_out.get(domain, ())} if domain != "facts" else set()
    documents: list[str] = []
    while len(documents) < count:
        item = world.draw(domain, rng)
        if item.prompt not in hidden:
            documents.append(item.text)
    return documents


def _names(count: int, rng: random.Random) -> list[str]:
    """Distinct invented names of three syllables, such as `zorina`."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))] = None
    return list(names)
