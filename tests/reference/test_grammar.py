from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import SourceError
from exporter.reference.grammar import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    negatives,
    neighbours,
    prompt_set,
    scene_from_prompt,
    scenes,
)

things = st.builds(Thing, st.sampled_from(SIZES), st.sampled_from(COLOURS), st.sampled_from(SHAPES))
singles = st.builds(lambda thing, ground: Scene((thing,), None, ground), things, st.sampled_from(BACKGROUNDS))
pairs = st.builds(
    lambda both, relation, ground: Scene(both, relation, ground),
    st.tuples(things, things).filter(lambda both: both[0].colour != both[1].colour),
    st.sampled_from(RELATIONS),
    st.sampled_from(BACKGROUNDS),
)
any_scene = singles | pairs


def differences(one: Scene, other: Scene) -> int:
    count = (one.background != other.background) + (one.relation != other.relation)
    for left, right in zip(one.things, other.things, strict=True):
        count += (left.size != right.size) + (left.colour != right.colour) + (left.shape != right.shape)
    return count


def test_grammar_is_as_large_as_promised():
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8
    assert (len(SIZES), len(RELATIONS), len(BACKGROUNDS)) == (2, 4, 4)


def test_example_prompt():
    scene = Scene((Thing("large", "red", "circle"), Thing("small", "blue", "star")), "left of", "gray")
    assert scene.prompt == "a large red circle left of a small blue star on a gray background"


@given(any_scene)
def test_prompt_round_trip(scene):
    assert scene_from_prompt(scene.prompt) == scene
    assert scene_from_prompt(f"  {scene.prompt.upper()} ") == scene


@given(any_scene)
def test_mirrored_scene_is_held_out_together(scene):
    assert scene.canonical.canonical == scene.canonical
    assert is_held_out(scene) == is_held_out(scene.canonical)
    assert scene.canonical.relation in (None, "left of", "above")


@given(any_scene, st.integers(1, 16))
def test_negatives_change_one_attribute_and_are_distinct(scene, count):
    found = negatives(scene, count)
    assert len(found) == count == len(set(found))
    assert all(differences(scene, other) == 1 for other in found)
    assert found == negatives(scene_from_prompt(scene.prompt), count)


@given(pairs)
def test_no_negative_shows_the_image_of_the_right_prompt(scene):
    assert scene.canonical not in {other.canonical for other in neighbours(scene)}


def test_single_scene_has_just_sixteen_neighbours():
    scene = scene_from_prompt("a small red ring on a white background")
    assert len(neighbours(scene)) == 16
    with pytest.raises(SourceError, match="count out of range; got 17"):
        negatives(scene, 17)


def test_a_tenth_is_held_out():
    every = [
        Scene((Thing(size, colour, shape),), None, ground)
        for size in SIZES
        for colour in COLOURS
        for shape in SHAPES
        for ground in BACKGROUNDS
    ]
    every += [other for scene in scenes(5, 200, held_out=False) if scene.relation for other in neighbours(scene)]
    assert 0.085 < sum(map(is_held_out, every)) / len(every) < 0.115


@pytest.mark.parametrize("held_out", [True, False])
def test_scenes_are_deterministic_and_on_their_side(held_out):
    drawn = scenes(7, 300, held_out=held_out)
    assert drawn == scenes(7, 300, held_out=held_out)
    assert drawn[:20] == scenes(7, 20, held_out=held_out)
    assert drawn != scenes(8, 300, held_out=held_out)
    assert {is_held_out(scene) for scene in drawn} == {held_out}
    assert {len(scene.things) for scene in drawn} == {1, 2}


@pytest.mark.parametrize(
    ("name", "count", "held_out"),
    [
        ("shapes-validation", 256, True),
        ("shapes-calibration", 256, False),
        ("shapes-train", 4096, False),
        ("shapes-test", 2048, True),
    ],
)
def test_prompt_sets(name, count, held_out):
    prompts = prompt_set(name)
    assert len(prompts) == count
    assert prompts == prompt_set(name)
    assert {is_held_out(scene_from_prompt(prompt)) for prompt in prompts} == {held_out}


def test_first_prompts_of_the_sets_never_change():
    assert prompt_set("shapes-validation")[0] == FIRST["shapes-validation"]
    assert prompt_set("shapes-calibration")[0] == FIRST["shapes-calibration"]


def test_unknown_prompt_set():
    with pytest.raises(SourceError, match="unknown name; got 'coco'"):
        prompt_set("coco")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a large red circle",
        "a large red circle on a gray wall",
        "a large mauve circle on a gray background",
        "a huge red circle on a gray background",
        "a large red circle near a small blue star on a gray background",
        "a large red circle left of a small red star on a gray background",
        "a large red circle left of on a gray background",
    ],
)
def test_what_is_no_prompt_of_the_grammar(text):
    with pytest.raises(SourceError, match="grammar: "):
        scene_from_prompt(text)


def test_impossible_scenes():
    thing = Thing("small", "red", "ring")
    with pytest.raises(SourceError, match="relation does not fit"):
        Scene((thing,), "above", "white")
    with pytest.raises(SourceError, match="wrong number of things; got 0"):
        Scene((), None, "white")


def test_importing_the_package_and_the_grammar_is_cheap():
    code = (
        "import sys, exporter.reference, exporter.reference.grammar as g; g.scenes(1, 3, held_out=True); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FIRST = {
    "shapes-validation": "a large pink cross right of a small cyan circle on a gray background",
    "shapes-calibration": "a small blue square left of a large green cross on a black background",
}
