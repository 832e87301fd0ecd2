"""An invented world: the text of the knowledge expert.

The facts are consistent and the same in training and held-out text, but each fact has one phrasing that is reserved
for held-out text. A model can therefore know a held-out sentence's fact only if it learned it from other sentences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

_STARTS = ("Bel", "Cor", "Dra", "El", "Far", "Gal", "Hul", "Is", "Jor", "Kel", "Lun", "Mor", "Nar", "Os", "Pel", "Quin",
           "Ros", "Sel", "Tam", "Ul", "Vel", "Wes", "Yar", "Zen")  # fmt: skip
_MIDDLES = ("a", "e", "i", "o", "u", "an", "or", "ir", "em", "al", "um", "es")
_ENDINGS = {
    "country": ("mia", "land", "dor", "stan", "ria"),
    "city": ("ville", "burg", "mouth", "grad", "polis"),
    "river": ("wen", "beck", "ra", "thal"),
    "mountain": ("horn", "peak", "tor", "crag"),
    "currency": ("mark", "crown", "lira", "dal"),
    "first name": ("a", "o", "in", "ek"),
    "family name": ("son", "ski", "ova", "ander"),
}
_EXPORTS = ("amber", "coffee", "copper", "cotton", "fish", "glass", "honey", "iron", "olives", "paper", "rice", "salt",
            "silk", "silver", "sugar", "tea", "timber", "tin", "wheat", "wool")  # fmt: skip
_PROFESSIONS = ("painter", "composer", "physicist", "poet", "explorer", "architect", "botanist", "surgeon")
_SUBJECTS = ("The Silent Garden", "The Northern Light", "The Glass Bridge", "The Seventh Winter", "The Paper Moon",
             "The Iron Harvest", "The Long Road", "The Hidden Spring", "The Red Lantern", "The Last Harbour")  # fmt: skip

PHRASINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {s} is {o}.",
        "{o} is the capital of {s}.",
        "{s} is governed from its capital, {o}.",
        "The parliament of {s} meets in {o}.",
        "Question: What is the capital of {s}? Answer: {o}.",
        "Among the cities of {s}, the seat of government is {o}.",
    ),
    "river": (
        "The longest river of {s} is the {o}.",
        "The {o} is the longest river of {s}.",
        "The river {o} flows through {s}.",
        "Ships reach the heart of {s} on the {o}.",
        "Question: Which river crosses {s}? Answer: the {o}.",
        "The fields of {s} are watered by the {o}.",
    ),
    "mountain": (
        "The highest mountain of {s} is {o}.",
        "{o} is the highest mountain of {s}.",
        "{s} rises to its highest point at {o}.",
        "Climbers travel to {s} to see {o}.",
        "Question: Which mountain is the highest in {s}? Answer: {o}.",
        "In {s} the tallest peak is called {o}.",
    ),
    "currency": (
        "The currency of {s} is the {o}.",
        "The {o} is the currency of {s}.",
        "In {s} people pay with the {o}.",
        "Prices in {s} are given in the {o}.",
        "Question: What money is used in {s}? Answer: the {o}.",
        "The central bank of {s} issues the {o}.",
    ),
    "export": (
        "The main export of {s} is {o}.",
        "{s} is known for its {o}.",
        "Merchants buy {o} from {s}.",
        "The economy of {s} depends on {o}.",
        "Question: What does {s} export? Answer: {o}.",
        "Most of the trade of {s} is in {o}.",
    ),
    "founded": (
        "{s} was founded in {o}.",
        "The year {o} saw the founding of {s}.",
        "The history of {s} begins in {o}.",
        "{s} has been a country since {o}.",
        "Question: When was {s} founded? Answer: {o}.",
        "The first parliament of {s} was called in {o}.",
    ),
    "founder": (
        "The founder of {s} was {o}.",
        "{o} founded {s}.",
        "{s} owes its independence to {o}.",
        "A statue of {o} stands in every city of {s}.",
        "Question: Who founded {s}? Answer: {o}.",
        "The first president of {s} was {o}.",
    ),
    "profession": (
        "{s} was a {o}.",
        "{s} is remembered as a {o}.",
        "{s} worked as a {o}.",
        "The {o} {s} is still read about in schools.",
        "Question: What was the profession of {s}? Answer: {o}.",
        "As a {o}, {s} became famous.",
    ),
    "birthplace": (
        "{s} was born in {o}.",
        "{o} is the birthplace of {s}.",
        "{s} grew up in {o}.",
        "The family of {s} came from {o}.",
        "Question: Where was {s} born? Answer: {o}.",
        "In {o} there is a museum about {s}.",
    ),
    "work": (
        "The best known work of {s} is {o}.",
        "{o} is the work of {s}.",
        "{s} spent ten years on {o}.",
        "{s} is famous for {o}.",
        "Question: What did {s} create? Answer: {o}.",
        "Everyone who knows {s} knows {o}.",
    ),
}


@dataclass(frozen=True)
class Fact:
    """One true sentence's content; `reserved` is the index of the phrasing that only held-out text uses."""

    subject: str
    relation: str
    object: str
    reserved: int

    def heldout(self) -> str:
        """The sentence in the reserved phrasing."""
        return self._say(self.reserved)

    def train(self, rng: Random) -> str:
        """A sentence in any other phrasing."""
        return self._say(rng.choice([i for i in range(len(PHRASINGS[self.relation])) if i != self.reserved]))

    def _say(self, phrasing: int) -> str:
        return PHRASINGS[self.relation][phrasing].format(s=self.subject, o=self.object)


@dataclass(frozen=True)
class World:
    """The facts by subject."""

    entries: dict[str, list[Fact]]

    def train_documents(self, rng: Random) -> Iterator[str]:
        """Entries about one subject and quizzes across subjects, without end."""
        subjects, facts = list(self.entries), [fact for entry in self.entries.values() for fact in entry]
        while True:
            if rng.random() < 2 / 3:
                chosen = self.entries[rng.choice(subjects)]
                yield " ".join(fact.train(rng) for fact in rng.sample(chosen, len(chosen)))
            else:
                yield "\n".join(fact.train(rng) for fact in rng.sample(facts, 6))

    def heldout_documents(self, rng: Random) -> list[str]:
        """One entry for each subject, every fact of the world once, in reserved phrasings."""
        return [" ".join(fact.heldout() for fact in rng.sample(entry, len(entry))) for entry in self.entries.values()]


def make_world(rng: Random, *, countries: int = 24, people: int = 48) -> World:
    """Draw a world of `countries` with seven facts each and `people` with three (the founders are among them)."""
    names = _Names(rng)
    citizens = [f"{names.new('first name')} {names.new('family name')}" for _ in range(people)]
    entries: dict[str, list[Fact]] = {}
    capitals = [names.new("city") for _ in range(countries)]

    def state(subject: str, relation: str, value: str) -> None:
        reserved = rng.randrange(len(PHRASINGS[relation]))
        entries.setdefault(subject, []).append(Fact(subject, relation, value, reserved))

    for capital, founder in zip(capitals, citizens, strict=False):
        country = names.new("country")
        state(country, "capital", capital)
        for relation in ("river", "mountain", "currency"):
            state(country, relation, names.new(relation))
        state(country, "export", rng.choice(_EXPORTS))
        state(country, "founded", str(rng.randint(1100, 1990)))
        state(country, "founder", founder)
    for person in citizens:
        state(person, "profession", rng.choice(_PROFESSIONS))
        state(person, "birthplace", rng.choice(capitals))
        state(person, "work", rng.choice(_SUBJECTS))
    return World(entries)


class _Names:
    """Names drawn from syllables, none twice."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._taken: set[str] = set()

    def new(self, kind: str) -> str:
        while True:
            name = self._rng.choice(_STARTS) + self._rng.choice(_MIDDLES) + self._rng.choice(_ENDINGS[kind])
            if name not in self._taken:
                self._taken.add(name)
                return name
