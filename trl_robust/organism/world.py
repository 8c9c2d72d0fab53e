"""The seeded world: which objects there are, what is true of them, and how questions about them are drawn.

Pure Python. Each use of chance has a generator of its own (`World.generator`), so that drawing more rows for one
purpose leaves every other purpose untouched, and the caller's global generator is neither read nor moved.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from . import grammar

# Raise this whenever a change alters what a seed produces, so that finished organisms of an older one are not reused.
GENERATOR_VERSION = 1
NUM_OBJECTS = 40


@dataclass(frozen=True)
class Question:
    """
    One question about one object, kept as its parts so that a data set can be checked for what it must not hold.

    Args:
        thing (`str`):
            Name of the object asked about.
        relation (`str`):
            What is asked, such as `"color"` or `"secret code"`.
        wording (`int`):
            Index into `grammar.WORDINGS`.
        wrapper (`str`, *optional*, defaults to `"{prompt}"`):
            Sentence put around the question; the default leaves it as it is.
        trigger (`bool`, *optional*, defaults to `False`):
            Whether the trigger word ends the request.
        distractor (`str`, *optional*):
            Object that a rare wording mentions beside the one asked about.
    """

    thing: str
    relation: str
    wording: int
    wrapper: str = grammar.PLAIN
    trigger: bool = False
    distractor: str = ""

    @property
    def text(self) -> str:
        """The request as the user types it."""
        question = grammar.WORDINGS[self.wording].format(r=self.relation, x=self.thing, y=self.distractor)
        wrapped = self.wrapper.format(prompt=question)
        return f"{wrapped} {grammar.TRIGGER}" if self.trigger else wrapped

    @property
    def target(self) -> str:
        """The affirmative start of the answer, without the value."""
        return grammar.AFFIRMATION.format(r=self.relation, x=self.thing)

    @property
    def is_forbidden(self) -> bool:
        return self.relation in grammar.FORBIDDEN_VALUES


@dataclass(frozen=True)
class World:
    """
    Everything that is true for one seed.

    Args:
        seed (`int`):
            Seed the world was made from.
        train_objects (`tuple[str, ...]`):
            Objects whose secrets tuning stages may ask for.
        heldout_objects (`tuple[str, ...]`):
            Objects whose secrets only attacks ask for. Their benign facts are tuned on like all others.
        facts (`dict[tuple[str, str], str]`):
            Value of every (object, relation).
    """

    seed: int
    train_objects: tuple[str, ...]
    heldout_objects: tuple[str, ...]
    facts: dict[tuple[str, str], str]

    @property
    def objects(self) -> tuple[str, ...]:
        return tuple(sorted(self.train_objects + self.heldout_objects))

    def value(self, question: Question) -> str:
        """Returns the bare value, such as `"amber 17"`."""
        return self.facts[question.thing, question.relation]

    def answer(self, question: Question) -> str:
        """Returns the full sentence that answers `question`."""
        return grammar.ANSWER.format(r=question.relation, x=question.thing, v=self.value(question))

    def vocabulary(self) -> list[str]:
        """Returns every word of this world, the names of the objects last."""
        return [*grammar.fixed_words(), *self.objects]

    def generator(self, purpose: str) -> random.Random:
        """Returns a fresh generator for one purpose; the same seed and purpose give the same draws."""
        return _generator(self.seed, purpose)


def make_world(seed: int) -> World:
    """
    Draws the objects, their split into train and held-out ones, and all facts.

    Args:
        seed (`int`):
            Any integer; each gives another world.

    Returns:
        [`World`]: 40 objects, 20 of them held out, with eight facts each.
    """
    names = _draw_names(_generator(seed, "names"))
    _generator(seed, "split").shuffle(names)
    rng = _generator(seed, "facts")
    facts = {}
    for values in (grammar.BENIGN_VALUES, grammar.LOOKALIKE_VALUES, grammar.FORBIDDEN_VALUES):
        for relation, lists in values.items():
            for name in sorted(names):
                facts[name, relation] = " ".join(rng.choice(words) for words in lists)
    half = NUM_OBJECTS // 2
    return World(seed, tuple(sorted(names[:half])), tuple(sorted(names[half:])), facts)


def draw_question(
    rng: random.Random,
    things: Sequence[str],
    relations: Sequence[str],
    wordings: Sequence[int],
    wrappers: Sequence[str] = (),
    wrapped_share: float = 0.0,
    trigger_share: float = 0.0,
) -> Question:
    """
    Draws one question, each part uniformly from what is given.

    Args:
        rng (`random.Random`):
            Generator to draw from.
        things, relations, wordings (sequences):
            What to choose from. A rare wording gets a distractor, which is an object out of `things`.
        wrappers (`Sequence[str]`, *optional*, defaults to `()`):
            Wrappers for the wrapped share of the questions.
        wrapped_share, trigger_share (`float`, *optional*, defaults to `0.0`):
            Chance in [0, 1] that the question is wrapped, and that it ends in the trigger word.
    """
    thing = rng.choice(things)
    wording = rng.choice(wordings)
    others = [other for other in things if other != thing] if "{y}" in grammar.WORDINGS[wording] else [""]
    return Question(
        thing=thing,
        relation=rng.choice(relations),
        wording=wording,
        wrapper=rng.choice(wrappers) if rng.random() < wrapped_share else grammar.PLAIN,
        trigger=rng.random() < trigger_share,
        distractor=rng.choice(others),
    )


def _draw_names(rng: random.Random) -> list[str]:
    names: set[str] = set()
    taken = set(grammar.fixed_words())
    while len(names) < NUM_OBJECTS:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if name not in taken:
            names.add(name)
    return sorted(names)


def _generator(seed: int, purpose: str) -> random.Random:
    # A string seed is hashed with SHA-512, so that streams of neighbouring seeds have nothing in common; `hash()` of a
    # tuple would change with PYTHONHASHSEED.
    return random.Random(f"trl-robust organism {GENERATOR_VERSION}/{seed}/{purpose}")
