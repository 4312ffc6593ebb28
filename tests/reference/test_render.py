from __future__ import annotations

import numpy as np
import pytest

from exporter.reference.grammar import Scene, Thing, scene_from_prompt, scenes
from exporter.reference.reader import agrees, read
from exporter.reference.render import BACKGROUND_VALUES, COLOUR_VALUES, render, render_many

DRAWN = scenes(31, 400, held_out=True)


def test_an_image_depends_on_scene_and_seed_alone():
    scene = DRAWN[0]
    first = render(scene, 5)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, render(scene, 5))
    assert not np.array_equal(first, render(scene, 6))
    assert np.array_equal(render_many(DRAWN[:3], 9)[2], render(DRAWN[2], 11))


@pytest.mark.parametrize("shape", ["circle", "triangle", "star", "ring"])
def test_edges_are_anti_aliased_and_nothing_else_is_mixed(shape):
    image = render(Scene((Thing("large", "red", shape),), None, "white"), 3).reshape(-1, 3).astype(float)
    red, white = np.array(COLOUR_VALUES["red"], float), np.array(BACKGROUND_VALUES["white"], float)
    share = ((image - white) @ (red - white)) / ((red - white) @ (red - white))
    assert np.abs(image - (white + share[:, None] * (red - white))).max() < 1
    mixed = (share > 0.02) & (share < 0.98)
    assert 20 < mixed.sum() < 260
    assert len(np.unique(share[mixed].round(3))) > 8


def test_mirrored_prompts_draw_the_same_layout():
    left = render(scene_from_prompt("a large red circle left of a small blue star on a gray background"), 1)
    reading = {colour: column for colour, column, _, _ in read(left).things}
    right = render(scene_from_prompt("a small blue star right of a large red circle on a gray background"), 1)
    mirrored = {colour: column for colour, column, _, _ in read(right).things}
    assert reading["red"] < 28 < 36 < reading["blue"]
    assert mirrored["red"] < 28 < 36 < mirrored["blue"]


def test_sizes_do_not_overlap():
    area = {}
    for size in ("large", "small"):
        images = [render(Scene((Thing(size, "green", "cross"),), None, "black"), seed) for seed in range(30)]
        area[size] = [int((image[..., 1] > 77).sum()) for image in images]
    assert min(area["large"]) > 2 * max(area["small"])


def test_things_stay_inside():
    for index, scene in enumerate(DRAWN):
        image = render(scene, index)
        ground = np.array(BACKGROUND_VALUES[scene.background])
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        touched = (border != ground).any(axis=1).sum()  # a large star's or triangle's tip may reach it
        assert touched <= 6, scene.prompt


def test_reader_on_fresh_renders():
    images = render_many(DRAWN, 12_345)
    right = [agrees(image, scene) for image, scene in zip(images, DRAWN, strict=True)]
    assert np.mean(right) >= 0.97


@pytest.mark.parametrize(
    ("was", "becomes"),
    [("left of", "right of"), ("left of", "above"), ("blue", "pink"), ("gray", "beige"), ("red", "orange")],
)
def test_reader_sees_what_is_wrong(was, becomes):
    prompt = "a large red circle left of a small blue star on a gray background"
    image = render(scene_from_prompt(prompt), 4)
    assert agrees(image, scene_from_prompt(prompt))
    assert not agrees(image, scene_from_prompt(prompt.replace(was, becomes)))


def test_reader_counts_things():
    pair = scene_from_prompt("a large red circle left of a small blue star on a gray background")
    single = scene_from_prompt("a large red circle on a gray background")
    assert not agrees(render(pair, 1), single)
    assert not agrees(render(single, 1), pair)


def test_reader_bears_noise_and_blank_images():
    noise = np.random.default_rng(0).normal(0, 12, (64, 64, 3))
    scene = scene_from_prompt("a small cyan ring below a large purple square on a beige background")
    assert agrees(np.clip(render(scene, 2) + noise, 0, 255).astype(np.uint8), scene)
    assert read(np.full((64, 64, 3), 255, np.uint8)).things == ()
