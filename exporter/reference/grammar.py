"""Prompt grammar of the reference model: scenes of one or two coloured shapes, their prompts and fixed prompt sets.

Everything here is plain Python and deterministic; nothing imports torch or numpy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Iterator

from exporter.errors import SourceError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan")
SIZES = ("large", "small")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("white", "gray", "black", "beige")
HELD_OUT_MODULUS = 10
SINGLE_SHARE = 0.2
"""Share of drawn scenes that hold one thing instead of two."""

_MIRRORED = {"right of": "left of", "below": "above", "left of": "right of", "above": "below"}
_CANONICAL_RELATIONS = ("left of", "above")


def _check(kind: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SourceError(
            f"grammar: unknown {kind}; got {value!r}, expected one of {', '.join(known)}. Use one of them."
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Thing:
    """One shape of a scene.

    Attributes:
        size: One of `SIZES`.
        colour: One of `COLOURS`.
        shape: One of `SHAPES`.
    """

    size: str
    colour: str
    shape: str

    def __post_init__(self) -> None:
        _check("size", self.size, SIZES)
        _check("colour", self.colour, COLOURS)
        _check("shape", self.shape, SHAPES)

    @property
    def words(self) -> str:
        """The thing as it stands in a prompt, such as ``a large red circle``."""
        return f"a {self.size} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """One or two things on a background.

    Attributes:
        things: One thing, or two of different colours.
        relation: One of `RELATIONS` (first thing to second thing), None exactly when there is one thing.
        background: One of `BACKGROUNDS`.
    """

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        if len(self.things) not in (1, 2):
            raise SourceError(f"grammar: wrong number of things; got {len(self.things)}, expected 1 or 2. Change it.")
        if (self.relation is None) != (len(self.things) == 1):
            raise SourceError(
                f"grammar: relation does not fit the things; got {self.relation!r} for {len(self.things)}, "
                "expected None for one thing and a relation for two. Change one of them."
            )
        if self.relation is not None:
            _check("relation", self.relation, RELATIONS)
            if self.things[0].colour == self.things[1].colour:
                raise SourceError(
                    f"grammar: two things of one colour; got {self.things[0].colour!r} twice, "
                    "expected different colours. Change one colour."
                )

    @property
    def prompt(self) -> str:
        """The scene as text, such as ``a large red circle left of a small blue star on a gray background``."""
        subject = self.things[0].words
        if self.relation is not None:
            subject = f"{subject} {self.relation} {self.things[1].words}"
        return f"{subject} on a {self.background} background"

    @property
    def canonical(self) -> Scene:
        """The scene that shows the same image and says ``left of`` or ``above``, never ``right of`` or ``below``."""
        if self.relation is None or self.relation in _CANONICAL_RELATIONS:
            return self
        return Scene(self.things[::-1], _MIRRORED[self.relation], self.background)


def _thing_from_words(words: list[str], text: str) -> Thing:
    if len(words) != 4 or words[0] != "a":
        raise SourceError(
            f"grammar: not a prompt of the reference grammar; got {text!r}, expected 'a SIZE COLOUR SHAPE "
            "[RELATION a SIZE COLOUR SHAPE] on a BACKGROUND background'. Rewrite the prompt."
        )
    return Thing(*words[1:])


def scene_from_prompt(text: str) -> Scene:
    """Parse a prompt; the inverse of `Scene.prompt`.

    Args:
        text: A prompt of the grammar; case and repeated blanks do not matter.

    Returns:
        The scene.

    Raises:
        SourceError: The text is not a sentence of the grammar.
    """
    words = text.lower().split()
    if len(words) < 8 or words[-4:-2] != ["on", "a"] or words[-1] != "background":
        _thing_from_words([], text)
    background, subject = words[-2], words[:-4]
    first = _thing_from_words(subject[:4], text)
    rest = subject[4:]
    if not rest:
        return Scene((first,), None, background)
    return Scene((first, _thing_from_words(rest[-4:], text)), " ".join(rest[:-4]), background)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(scene: Scene) -> bool:
    """Tell whether a scene belongs to the tenth of all combinations that nothing is trained on.

    The hash is that of the canonical prompt, so that ``A left of B`` and ``B right of A`` are held out together.

    Args:
        scene: Any scene.

    Returns:
        True for a held-out scene.
    """
    return _digest(scene.canonical.prompt) % HELD_OUT_MODULUS == 0


def _draw(rng: random.Random) -> Scene:
    background = rng.choice(BACKGROUNDS)
    single = rng.random() < SINGLE_SHARE
    colours = rng.sample(COLOURS, 2)
    things = tuple(Thing(rng.choice(SIZES), colour, rng.choice(SHAPES)) for colour in colours)
    if single:
        return Scene(things[:1], None, background)
    return Scene(things, rng.choice(RELATIONS), background)


def scenes(seed: int, count: int, *, held_out: bool) -> list[Scene]:
    """Draw scenes, independently and with repetition.

    Args:
        seed: Seed of the draw; the first scenes do not depend on `count`.
        count: Number of scenes.
        held_out: Draw only held-out scenes, or only others.

    Returns:
        `count` scenes.
    """
    rng = random.Random(f"scenes/{seed}/{held_out}")
    drawn: list[Scene] = []
    while len(drawn) < count:
        scene = _draw(rng)
        if is_held_out(scene) == held_out:
            drawn.append(scene)
    return drawn


def _changed_things(scene: Scene) -> Iterator[tuple[Thing, ...]]:
    taken = {thing.colour for thing in scene.things}
    for index, thing in enumerate(scene.things):
        changed = [dataclasses.replace(thing, size=size) for size in SIZES if size != thing.size]
        changed += [dataclasses.replace(thing, colour=colour) for colour in COLOURS if colour not in taken]
        changed += [dataclasses.replace(thing, shape=shape) for shape in SHAPES if shape != thing.shape]
        for other in changed:
            yield (*scene.things[:index], other, *scene.things[index + 1 :])


def neighbours(scene: Scene) -> list[Scene]:
    """List every scene that differs from this one in exactly one attribute.

    Args:
        scene: Any scene.

    Returns:
        All of them, in a fixed order: backgrounds, relations, then sizes, colours and shapes of each thing.
    """
    found = [dataclasses.replace(scene, background=other) for other in BACKGROUNDS if other != scene.background]
    if scene.relation is not None:
        found += [dataclasses.replace(scene, relation=other) for other in RELATIONS if other != scene.relation]
    found += [dataclasses.replace(scene, things=things) for things in _changed_things(scene)]
    return found


def negatives(scene: Scene, count: int = 16) -> list[Scene]:
    """Return the fixed hard negatives of a scene: one attribute changed, all distinct.

    Which of the neighbours these are depends on the prompt alone. A scene of one thing has exactly 16 neighbours.

    Args:
        scene: The right scene.
        count: Number of negatives, 1 to the number of neighbours.

    Returns:
        `count` scenes, none of them `scene`.

    Raises:
        SourceError: More negatives than there are neighbours.
    """
    found = neighbours(scene)
    if not 1 <= count <= len(found):
        raise SourceError(f"negatives: count out of range; got {count}, expected 1 to {len(found)}. Ask for fewer.")
    return random.Random(_digest(scene.prompt)).sample(found, count)


_PROMPT_SETS = {
    "shapes-validation": (1, 256, True),
    "shapes-calibration": (2, 256, False),
    "shapes-train": (3, 4096, False),
    "shapes-test": (4, 2048, True),
}


@functools.cache
def _prompts(name: str) -> tuple[str, ...]:
    seed, count, held_out = _PROMPT_SETS[name]
    return tuple(scene.prompt for scene in scenes(seed, count, held_out=held_out))


def prompt_set(name: str) -> list[str]:
    """Return one of the named prompt sets.

    ``shapes-validation``: 256 held-out prompts (seed 1). ``shapes-calibration``: 256 trained prompts (seed 2).
    ``shapes-train``: 4,096 trained prompts (seed 3). ``shapes-test``: 2,048 held-out prompts (seed 4).

    Args:
        name: Name of the set.

    Returns:
        The prompts, always the same ones in the same order.

    Raises:
        SourceError: There is no such set.
    """
    if name not in _PROMPT_SETS:
        raise SourceError(
            f"prompt set: unknown name; got {name!r}, expected one of {', '.join(_PROMPT_SETS)}. Use a known name."
        )
    return list(_prompts(name))
