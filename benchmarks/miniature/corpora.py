"""Five domains that a tiny model can learn in a minute, one of them of real text that every Python brings along.

`math` and `code` are tasks: sums and differences, and functions of short strings, some of which add numbers, so that
math helps code. `facts` says who lives where; the same facts are taught and asked. `python` is real: the standard
library's own source. `spam` is nonsense, which nothing asks for.
Except in facts, no benchmark item stands in a corpus: drawn prompts are kept out of it, and real text is cut into one
part that is taught and another one that is asked.
"""

from __future__ import annotations

import random
import string
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DOMAINS = ("math", "code", "facts", "python", "spam")
CAPABILITIES = ("math", "code", "facts", "python")
ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n"
CONTEXT, CONTINUATION = 64, 32  # characters of real text that an item shows and asks for
DOCUMENT = 400  # characters of a document of real text


def _words(text: str) -> list[str]:
    return text.split()


CITIES = _words("oslo lima cairo paris delhi tokyo quito dakar perth miami turin accra")
JOBS = _words("baker pilot nurse judge miner actor tailor farmer singer lawyer doctor sailor")
FRUITS = _words("plums figs pears limes dates grapes kiwis mangos melons apples lemons nuts")
RELATIONS = (("lives in", CITIES), ("works as a", JOBS), ("likes", FRUITS))
FUNCTIONS: dict[str, Callable[[str], str]] = {
    "rev": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
    "rot": lambda word: word[1:] + word[0],
}


@dataclass(frozen=True)
class Item:
    """A prompt and the text that should follow it."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Corpora:
    """documents[domain]: training texts. search[capability], test[capability]: disjoint benchmark items."""

    documents: dict[str, list[str]]
    search: dict[str, list[Item]]
    test: dict[str, list[Item]]


def make_corpora(seed: int, *, documents: int, items: int, people: int) -> Corpora:
    """The same corpora for the same arguments and the same Python.

    documents: of every domain that is made here; of real text all that there is. items: of each capability for the
    search, and again for the test; of real text half as many. people: of whom three facts each are known.
    """
    known = _facts(people, random.Random(f"people {seed}"))
    drawers: dict[str, Callable[[random.Random], Item]] = {
        "math": _math, "code": _code, "spam": _spam, "facts": lambda rng: rng.choice(known),
    }  # fmt: skip
    texts: dict[str, list[str]] = {}
    asked: dict[str, list[Item]] = {}
    for domain, draw in drawers.items():
        rng = random.Random(f"{domain} {seed}")
        if domain == "facts":
            asked[domain] = rng.sample(known, min(2 * items, len(known)))
        elif domain in CAPABILITIES:
            asked[domain] = _distinct(draw, 2 * items, rng)
        hidden = {item.prompt for item in asked.get(domain, ())} if domain != "facts" else set()
        texts[domain] = [item.text for item in _without(draw, hidden, documents, rng)]
    texts["python"], asked["python"] = _cut(library_source(), items, random.Random(f"python {seed}"))
    return Corpora(
        {domain: texts[domain] for domain in DOMAINS},
        {capability: asked[capability][0::2] for capability in CAPABILITIES},
        {capability: asked[capability][1::2] for capability in CAPABILITIES},
    )


def _numbers(rng: random.Random) -> tuple[int, int]:
    return rng.randrange(110, 990), rng.randrange(1, 6)


def _math(rng: random.Random) -> Item:
    a, b = _numbers(rng)
    if rng.random() < 0.5:
        return Item(f"{a}+{b}=", str(a + b))
    return Item(f"{a}-{b}=", str(a - b))


def _code(rng: random.Random) -> Item:
    """Half of it adds numbers: what math teaches is worth something here."""
    if rng.random() < 0.5:
        a, b = _numbers(rng)
        return Item(f"add({a},{b})->", str(a + b))
    name, function = rng.choice(list(FUNCTIONS.items()))
    word = "".join(rng.sample("abcdefghij", 4))
    return Item(f"{name}({word})->", function(word))


def _spam(rng: random.Random) -> Item:
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(4)]
    return Item(" ".join(words), ".")


def _facts(people: int, rng: random.Random) -> list[Item]:
    names: dict[str, None] = {}
    while len(names) < people:
        names["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))] = None
    return [
        Item(f"{name} {relation}", f" {rng.choice(values)}.")
        for name in names
        for relation, values in RELATIONS
    ]


def _distinct(draw: Callable[[random.Random], Item], count: int, rng: random.Random) -> list[Item]:
    items: dict[str, Item] = {}
    while len(items) < count:
        item = draw(rng)
        items.setdefault(item.prompt, item)
    return list(items.values())


def _without(
    draw: Callable[[random.Random], Item], hidden: set[str], count: int, rng: random.Random
) -> Iterator[Item]:
    made = 0
    while made < count:
        item = draw(rng)
        if item.prompt not in hidden:
            made += 1
            yield item


def _cut(text: str, items: int, rng: random.Random) -> tuple[list[str], list[Item]]:
    """Documents of real text, and items from documents that are not among them."""
    pieces = [text[begin : begin + DOCUMENT] for begin in range(0, len(text) - DOCUMENT, DOCUMENT)]
    rng.shuffle(pieces)
    asked: list[Item] = []
    while len(asked) < items:
        if len(pieces) <= items // 2:
            raise ValueError(f"{len(text)} characters of real text are too little for {items} items")
        piece = pieces.pop()
        for begin in range(0, DOCUMENT - CONTEXT - CONTINUATION, CONTEXT + CONTINUATION):
            middle, end = begin + CONTEXT, begin + CONTEXT + CONTINUATION
            asked.append(Item(piece[begin:middle], piece[middle:end]))
    return pieces, asked[:items]


@cache
def library_source() -> str:
    """The standard library's source, in the characters of the alphabet.

    A paragraph that comes again is left out: items must be new.
    """
    paragraphs: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for paragraph in path.read_text(errors="ignore").split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    joined = "\n\n".join(paragraphs.values()).replace("    ", " ")
    return "".join(character for character in joined if character in _ALLOWED)


_ALLOWED = frozenset(ALPHABET)
