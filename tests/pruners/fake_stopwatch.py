"""A target on which every unit costs what it says, so that what a method should find is known."""

from __future__ import annotations

from diffusers.models.transformers.transformer_2d import Transformer2DModel

from exporter.networks.standins import Bypass, Shortcut
from exporter.pruners.base import CutOptions
from exporter.pruners.blocks import blocks_of

REST = 5.0


class FakeStopwatch:
    """Units alone cost `extra` more than inside of a network.

    Args:
        dense: the network before any edit; never measured itself unless asked for.
        extra: of every call of a unit alone, in ms.
    """

    digest = "fake"

    def __init__(self, dense, extra=0.0):
        self._dense, self._extra = dense, extra
        self.wholes = 0

    def units_ms(self, network, paths):
        return {path: self._alone(network.get_submodule(path), path) for path in paths}

    def whole_ms(self, network):
        self.wholes += 1
        paths = [block.path for block in blocks_of(self._dense, CutOptions(0.5))]
        there = [path for path in paths if not isinstance(network.get_submodule(path), Bypass | Shortcut)]
        copies = [
            layer
            for module in network.modules()
            if isinstance(module, Transformer2DModel)
            for layer in list(module.transformer_blocks)[1:]
        ]
        parts = [*(self._dense.get_submodule(path) for path in there), *copies]
        return REST + sum(cost(part) for part in parts)

    def control(self):
        return {"whole": (1.0, 0.9, 1.1)}

    def _alone(self, module, path):
        return self._extra + (0.0 if path.endswith("conv_shortcut") else cost(module))


def cost(module):
    return 1.0 + sum(parameter.numel() for parameter in module.parameters()) / 1e5
