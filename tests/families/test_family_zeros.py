"""2:4 by second order in transformers, whose linear layers take rows of tokens and are folded to transposed weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.loan import DenseLoan
from exporter.lowering.export import MODEL_FILE, ExportOptions, export_component
from exporter.lowering.zeros import check_zeros
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruners import pruner
from exporter.pruners.base import Context

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def test_a_transformer_keeps_its_pattern_in_the_exported_graph(
    loan_of: Callable[[str], DenseLoan], tmp_path: Path
) -> None:
    loan: Any = loan_of("PixArtAlphaPipeline")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    network = load_network(loan.dense.path / "transformer", cls="PixArtTransformer2DModel")
    method = pruner("sparsegpt")
    options = method.options(prompts=str(prompts), images=2)
    outcome = method(options).prune(network, Context(torch.Generator(), Silent(), tmp_path, loan))
    assert set(outcome.facts["skipped"]) >= {"pos_embed.proj"}
    assert len(outcome.sparsity) > 15
    export_component("transformer", network, tmp_path, ExportOptions(latent=8, tokens=8))
    found = check_zeros(tmp_path / MODEL_FILE, outcome.sparsity, "transformer")
    assert found["operators"] >= len(outcome.sparsity)
