"""What an import costs and changes: nothing heavy, nothing global, nothing printed."""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import exporter

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "torch_pruning", "plotly")
RUNTIMES = ("onnxruntime", "openvino", "coremltools", "tensorrt", "tensorrt_rtx")
LIGHT = (
    "exporter",
    "exporter.artifact",
    "exporter.cli",
    "exporter.errors",
    "exporter.progress",
    "exporter.pruners",
    "exporter.recipe",
    "targets",
    "targets.base",
    "calibration",
)
HELP_SECONDS = 0.4

FreshPython = Callable[..., "subprocess.CompletedProcess[str]"]

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys

def names(*packages):
    for package in packages:
        module = importlib.import_module(package)
        yield package
        for found in pkgutil.walk_packages(module.__path__, package + "."):
            if not found.name.endswith("__main__"):
                yield found.name
"""
GLOBAL_STATE = """
import logging, os, random, signal, threading, warnings
import accelerate, diffusers, numpy, optimum, torch, torch_pruning, torchmetrics, transformers
import nncf, onnx, onnxruntime, openvino
from diffusers import StableDiffusionPipeline  # loads lazily, and says then that torchvision is missing

def state():
    return {
        "gradients": torch.is_grad_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "torch's random state": torch.get_rng_state().tolist(),
        "random state": repr(random.getstate()),
        "numpy's random state": repr(numpy.random.get_state()),
        "log handlers": [repr(handler) for handler in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
        "warning filters": [repr(entry) for entry in warnings.filters],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "Ctrl-C": repr(signal.getsignal(signal.SIGINT)),
        "threads of Python": threading.active_count(),
    }
"""


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_nothing_heavy(module: str, fresh_python: FreshPython) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    done = fresh_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.mark.slow
def test_importing_every_module_changes_and_prints_nothing(fresh_python: FreshPython) -> None:
    code = (
        IMPORT_EVERYTHING
        + GLOBAL_STATE
        + "before = state()\nsys.stdout.write('|')\nsys.stderr.write('|')\n"
        + "for name in names('exporter', 'targets', 'calibration'): importlib.import_module(name)\n"
        + "sys.stderr.write('|')\nafter = state()\n"
        + "print('|' + json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))\n"
    )
    done = fresh_python("-c", code)
    assert done.returncode == 0, done.stderr
    _, printed, changed = done.stdout.split("|", maxsplit=2)
    assert json.loads(changed) == {}
    assert printed == ""
    assert done.stderr.split("|")[1] == ""


@pytest.mark.slow
def test_importing_the_whole_exporter_loads_no_runtime(fresh_python: FreshPython) -> None:
    code = (
        IMPORT_EVERYTHING
        + "for name in names('exporter'): importlib.import_module(name)\n"
        + f"print(json.dumps(sorted(set({RUNTIMES!r}) & set(sys.modules))))"
    )
    done = fresh_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_public_names_are_there_documented_and_in_the_readme(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    names = [name for name in exporter.__all__ if name != "__version__"]
    assert len(set(exporter.__all__)) == len(exporter.__all__)
    assert 6 <= len(names) <= 20, "about a dozen"
    for name in names:
        thing = getattr(exporter, name)
        assert thing.__doc__, f"exporter.{name} has no docstring"
        assert f"`{name}" in readme or f"exporter.{name}" in readme, f"exporter.{name} is not in the README"


def test_nothing_undocumented_is_public() -> None:
    modules = {name for name, thing in vars(exporter).items() if isinstance(thing, type(sys))}
    public = {name for name in vars(exporter) if not name.startswith("_") and name != "annotations"}
    assert public - modules <= set(exporter.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(importlib.import_module("exporter"), "no_such_name")


def test_help_is_fast_and_loads_nothing_heavy(fresh_python: FreshPython) -> None:
    code = (
        "import sys; sys.argv = ['exporter', '--help']\n"
        "from exporter.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"sys.stderr.write(','.join(sorted(set({HEAVY!r}) & set(sys.modules))))"
    )
    done = fresh_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout
    assert done.stderr == ""
    # Processor time, the best of several: the wall time of a quiet machine, without what the neighbours take.
    assert min(_processor_seconds(fresh_python, code) for _ in range(5)) < HELP_SECONDS


def _processor_seconds(fresh_python: FreshPython, code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    fresh_python("-c", code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
