"""Copies of packages with one thing changed, as a wrong converter would have written them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


class Damage:
    """Copies of a package with one thing changed in its program."""

    def __init__(self, package: Path, folder: Path) -> None:
        from targets.mil.package import model_file
        from targets.mil.proto import messages

        self.package, self.folder = package, folder
        self.model = messages()[0].Model()
        self.model.ParseFromString(model_file(package).read_bytes())
        (function,) = self.model.mlProgram.functions.values()
        self.operations = function.block_specializations[function.opset].operations

    def find(self, kind: str, place: int = 0) -> Any:
        return [item for item in self.operations if item.type == kind][place]

    def constant(self, operation: Any, parameter: str) -> Any:
        name = operation.inputs[parameter].arguments[0].name
        return next(item for item in self.operations if item.outputs[0].name == name).attributes["val"]

    def save(self) -> Path:
        from targets.mil.package import model_file

        path = self.folder / "damaged.mlpackage"
        shutil.copytree(self.package, path)
        model_file(path).write_bytes(self.model.SerializeToString())
        return path
