from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score

from exporter.metrics import at_hand


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {name: index for index, name in enumerate(names)}
    text = {"vocab_size": len(names), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    text |= {"pad_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


class Embeds:
    """Gives torchmetrics plain tensors: since transformers 5 these methods return an object that holds one."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def to(self, device: object) -> Embeds:
        return self

    @property
    def config(self) -> Any:
        return self._model.config

    def get_image_features(self, *args: Any) -> torch.Tensor:
        return self._model.get_image_features(*args).pooler_output

    def get_text_features(self, *args: Any) -> torch.Tensor:
        return self._model.get_text_features(*args).pooler_output


def test_clip_score_is_torchmetrics(clip_folder: Path) -> None:
    clip = at_hand.clip_from_folder(clip_folder, "tiny")
    pictures = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3)).astype(np.uint8)
    prompts = [f"a {'red' if index % 2 else 'blue'} star{'s' * (index % 5)}" for index in range(20)]
    with torch.no_grad():
        expected = torchmetrics_clip_score(
            list(torch.from_numpy(pictures).permute(0, 3, 1, 2)), prompts, lambda: (Embeds(clip.model), clip.processor)
        )
    found = clip.scores(pictures, prompts)
    assert found.shape == (20,)
    assert found.min() > 0  # torchmetrics clamps the mean, not each score
    assert found.mean() == pytest.approx(float(expected), abs=1e-4)


def test_scores_below_zero_count_as_zero_and_long_prompts_are_cut(clip_folder: Path) -> None:
    clip = at_hand.clip_from_folder(clip_folder, "tiny")
    with torch.no_grad():
        clip.model.text_projection.weight.neg_()
    pictures = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)
    assert clip.scores(pictures, ["a star", "a very long prompt that does not fit into sixteen tokens"]).tolist() == [
        0,
        0,
    ]


def test_full_clip_is_read_from_the_cache(clip_folder: Path, tmp_path: Path) -> None:
    told = at_hand.full_clip(tmp_path)
    assert isinstance(told, str)
    assert "openai/clip-vit-large-patch14 is not in the model cache. Run once" in told
    repository = tmp_path / "models--openai--clip-vit-large-patch14"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "0123").symlink_to(clip_folder)
    found = at_hand.full_clip(tmp_path)
    assert isinstance(found, at_hand.Clip)
    assert found.name == "openai/clip-vit-large-patch14"


FINDERS = [
    (at_hand.lpips, "torchvision", "alexnet-owt-7be5be79.pth"),
    (at_hand.inception, "torch_fidelity", "weights-inception"),
]


@pytest.mark.parametrize(("find", "module", "weights"), FINDERS)
def test_library_that_is_not_installed_then_missing_weights_then_at_hand(
    find: Callable[[Path], object], module: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    told = str(find(tmp_path))
    assert f"{module} is not installed" in told
    assert "pip install" in told
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    told = str(find(tmp_path))
    assert weights in told
    assert "Run once with network access" in told
    (tmp_path / "checkpoints").mkdir()
    for name in (at_hand.ALEXNET_FILE, at_hand.INCEPTION_FILE):
        (tmp_path / "checkpoints" / name).write_bytes(b"")
    assert callable(find(tmp_path))


@pytest.mark.parametrize(("find", "module", "weights"), FINDERS)
def test_library_built_for_another_torch_is_told_not_raised(
    find: Callable[[Path], object], module: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{module}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    assert f"{module} is installed and does not load (operator torchvision::nms" in str(find(tmp_path))


def test_reasons_are_plain_sentences() -> None:
    for told in (at_hand.lpips(), at_hand.inception(), at_hand.full_clip()):
        if isinstance(told, str):
            assert json.loads(json.dumps(told)) == told
            assert "\n" not in told
