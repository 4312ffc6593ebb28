from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from exporter.errors import ComponentFailed
from exporter.metrics.images import SSIM_BYTES, at_once, detect, image_measurements, problem_measurement, psnr_db, ssim
from exporter.metrics.place import Place

PLACE = Place("2-tuned", "openvino")


def pair(count: int = 20, side: int = 24) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    reference = generator.integers(0, 256, (count, side, side, 3))
    noise = generator.normal(0, np.linspace(1, 40, count)[:, None, None, None], reference.shape)
    return np.clip(reference + noise, 0, 255).astype(np.uint8), reference.astype(np.uint8)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))


def test_psnr_and_ssim_are_torchmetrics() -> None:
    images, reference = pair()
    expected_psnr = [
        PeakSignalNoiseRatio(data_range=255.0)(tensor(a), tensor(b)).item()
        for a, b in zip(images, reference, strict=True)
    ]
    expected_ssim = [
        StructuralSimilarityIndexMeasure(data_range=255.0)(tensor(a), tensor(b)).item()
        for a, b in zip(images, reference, strict=True)
    ]
    np.testing.assert_allclose(psnr_db(images, reference), expected_psnr, atol=1e-4)
    np.testing.assert_allclose(ssim(images, reference), expected_ssim, atol=1e-4)


def test_psnr_by_its_definition() -> None:
    images = np.zeros((1, 16, 16, 3), np.uint8)
    reference = images.copy()
    reference[0, 0, 0, 0] = 255
    assert psnr_db(images, reference)[0] == pytest.approx(10 * np.log10(16 * 16 * 3))


def test_measurements_have_means_and_intervals() -> None:
    images, reference = pair()
    by_name = {m.name: m for m in image_measurements(images, reference, PLACE, lpips="needs AlexNet")}
    psnr = by_name["fidelity.image.psnr_db"]
    assert psnr.value == pytest.approx(psnr_db(images, reference).mean())
    assert psnr.low is not None
    assert psnr.high is not None
    assert psnr.low < psnr.value < psnr.high
    assert psnr.samples == 20
    assert len(psnr.detail["per_image"]) == 20
    assert by_name["fidelity.image.ssim"].value == pytest.approx(ssim(images, reference).mean())
    lpips = by_name["fidelity.image.lpips"]
    assert lpips.value is None
    assert lpips.note == "needs AlexNet"


def test_equal_images_are_capped_and_counted() -> None:
    images, reference = pair(4)
    images[:3] = reference[:3]
    found = image_measurements(images, reference, PLACE, lpips="")[0]
    assert found.detail["highest"] == 200.0
    assert "3 equal images count as 200 dB" in found.note
    assert ssim(reference, reference) == pytest.approx(np.ones(4))


def test_lpips_at_hand_is_averaged() -> None:
    images, reference = pair(4)
    found = image_measurements(images, reference, PLACE, lpips=lambda a, b: np.array([0.1, 0.2, 0.3, 0.4]))[2]
    assert (found.name, found.value, found.samples) == ("fidelity.image.lpips", pytest.approx(0.25), 4)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "wrong form; got float32"),
        (np.zeros((2, 3, 8, 8), np.uint8), "wrong form"),
        (np.zeros((0, 8, 8, 3), np.uint8), "wrong form"),
        (np.zeros((2, 8, 9, 3), np.uint8), "shapes differ"),
    ],
)
def test_wrong_images_are_refused(images: np.ndarray, told: str) -> None:
    with pytest.raises(ComponentFailed, match=told):
        psnr_db(images, np.zeros((2, 8, 8, 3), np.uint8))


def drawing() -> np.ndarray:
    """A gray background with a red square, as a fine image."""
    image = np.full((16, 16, 3), 0.5)
    image[4:10, 4:10] = (0.9, 0.1, 0.1)
    return image


@pytest.mark.parametrize("as_bytes", [True, False])
def test_detectors(as_bytes: bool) -> None:
    plain = drawing()
    images = np.stack([plain, plain * 0, plain * 0 + 0.5, (plain > 0.5).astype(float)])
    if as_bytes:
        images = (images * 255).round().astype(np.uint8)
    assert detect(images, (16, 16)) == [[], ["black", "constant"], ["constant"], ["saturated"]]
    assert detect(images[1:2] + (255 if as_bytes else 1), (16, 16)) == [["constant", "saturated"]]


def test_nan_is_found_and_hides_nothing_else_of_its_image() -> None:
    images = np.stack([drawing(), drawing()])
    images[1, 0, 0, 0] = np.nan
    assert detect(images, (16, 16)) == [[], ["nan"]]
    images[1] = np.inf
    assert detect(images, (16, 16)) == [[], ["nan"]]


def test_wrong_size_is_found() -> None:
    assert detect(drawing()[None], (16, 32)) == [["size"]]


def test_pure_colours_that_dense_has_too_are_fine() -> None:
    flat = np.zeros((1, 16, 16, 3), np.uint8)
    flat[..., 0] = 255
    flat[0, 4:8, 4:8] = (0, 0, 255)
    assert detect(flat, (16, 16)) == [["saturated"]]
    assert detect(flat, (16, 16), reference=flat) == [[]]


def test_a_dark_drawing_that_rounding_makes_a_little_darker_is_fine_and_a_white_one_is_not() -> None:
    dark = np.ones((1, 16, 16, 3), np.uint8)
    dark[0, 4:8, 4:8] = (20, 120, 40)
    black_behind = np.where(dark == 1, 0, dark).astype(np.uint8)
    assert detect(black_behind, (16, 16), reference=dark) == [[]]
    white_behind = np.where(dark == 1, 255, dark).astype(np.uint8)
    assert detect(white_behind, (16, 16), reference=dark) == [["saturated"]]
    assert detect(white_behind, (16, 16), reference=black_behind) == [["saturated"]]


def test_problems_are_counted_by_image_and_kind() -> None:
    found = problem_measurement([["nan"], [], ["black", "constant"]], PLACE)
    assert (found.value, found.samples) == (2.0, 3)
    assert found.detail == {"nan": 1, "black": 1, "constant": 1}


def test_large_images_are_compared_a_few_at_a_time() -> None:
    """SSIM would take 19 GiB for sixteen images of 512 x 512 at once."""
    assert at_once(100, 64 * 64) == 16
    assert at_once(100, 512 * 512) == 1
    assert at_once(3, 64 * 64) == 3
    for pixels in (64 * 64, 256 * 256, 512 * 512):
        assert at_once(100, pixels) * pixels * SSIM_BYTES < 1.5 * 2**30
