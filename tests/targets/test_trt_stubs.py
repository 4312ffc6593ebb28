"""Our calls of TensorRT, checked by type against the bindings of 10.16, 11.4 and TensorRT-RTX, without their library.

Those of TensorRT come from a package registry: run ``bash ci/trt_stubs.sh``. Spelling and types are all that this says;
TensorRT-RTX builds for real in ``test_trt.py``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from trt_stubs import Bindings, Mistake, errors, fetch, generate

TEN, ELEVEN, RTX = "10.16.1.11", "11.4.0.106", "rtx"
ALL, NOT_TEN = frozenset({TEN, ELEVEN, RTX}), frozenset({ELEVEN, RTX})
WHEELS = "TENSORRT_WHEELS"  # a folder that holds the wheels already
MISTAKES = (
    # What TensorRT 8 and 10 took.
    Mistake("trt_build.py", "library.BuilderFlag.STRIP_PLAN:", "library.BuilderFlag.FP16:", NOT_TEN),
    Mistake("trt_build.py", "library.BuilderFlag.REFIT:", "library.BuilderFlag.OBEY_PRECISION_CONSTRAINTS:", NOT_TEN),
    Mistake("trt_build.py", "int(flags.STRONGLY_TYPED)", "int(flags.EXPLICIT_BATCH)", NOT_TEN),
    Mistake("trt_build.py", "not network.num_outputs", "builder.platform_has_fast_fp16", NOT_TEN),
    Mistake("trt_session.py", "self._engine.num_io_tensors", "self._engine.device_memory_size", NOT_TEN),
    # What none of them takes: at least one for every kind of object that we use.
    Mistake("trt_build.py", "library.Builder(logger)", "library.Builder(log)", ALL),
    Mistake("trt_build.py", "builder.build_serialized_network(network, config)", "builder.build_engine(network)", ALL),
    Mistake(
        "trt_build.py", "config = builder.create_builder_config()", "config = builder.create_builder_config(1)", ALL
    ),
    Mistake("trt_build.py", "parser = library.OnnxParser(network, logger)", "parser = library.OnnxParser(logger)", ALL),
    Mistake("trt_build.py", "parse_from_file(str(source))", "parse_from_file(source)", ALL),
    Mistake("trt_build.py", "error.node_name()", "error.node_title()", ALL),
    Mistake("trt_build.py", "config.set_memory_pool_limit(", "config.max_workspace_size(", ALL),
    Mistake("trt_build.py", "ignore_mismatch=False", "ignoring=False", ALL),
    Mistake("trt_build.py", "config.get_timing_cache().serialize()", "config.get_timing_cache().dump()", ALL),
    Mistake(
        "trt_build.py",
        "def log(self, severity: Any, message: str)",
        "def log(self, severity: Any, message: str, more: int)",
        ALL,
    ),
    Mistake(
        "trt_build.py",
        "def step_complete(self, phase: str, step: int)",
        "def step_complete(self, phase: str, step: int, more: int)",
        ALL,
    ),
    Mistake("trt_session.py", "library.Runtime(self._logger)", "library.Runtime(self._log)", ALL),
    Mistake("trt_session.py", "self._engine.get_tensor_mode(", "self._engine.get_binding_mode(", ALL),
    Mistake("trt_session.py", "self._execution.set_tensor_address(", "self._execution.set_binding_address(", ALL),
    Mistake(
        "trt_session.py",
        "self._execution.execute_async_v3(int(self._stream))",
        "self._execution.execute_async_v3()",
        ALL,
    ),
    Mistake("trt_session.py", "inspector.get_engine_information(", "inspector.get_engine_info(", ALL),
    Mistake("trt_session.py", ".nptype(kind)", ".np_type(kind)", ALL),
    Mistake("trt_session.py", "layer_name: str, ms: float)", "layer_name: str, ms: float, more: int)", ALL),
)
CONFIGURED = """
import json, pathlib
from unittest.mock import MagicMock
import tensorrt_bindings as library
from targets.base import TargetError
from targets.trt_build import Log, Order, _configure, build, logger_of

def refusal(call):
    try:
        call()
    except TargetError as error:
        return str(error)

full = dict(strip=True, version_compatible=True, timing_cache=b"", workspace_mib=1, optimization=3)
told = {"version": library.__version__, "flags": [], "levels": []}
for refit in ("all", "identical"):
    config = MagicMock()
    _configure(library, config, Order(refit=refit, hardware="ampere", **full), "here")
    told["flags"].append([call.args[0].name for call in config.set_flag.call_args_list])
for hardware in ("ampere", "same-capability"):
    _configure(library, config, Order(hardware=hardware), "here")
    told["levels"].append(config.hardware_compatibility_level.name)
logger_of(library, log := Log()).log(library.ILogger.Severity.ERROR, "broken")
told["error"] = log.last_error()
told["elsewhere"] = refusal(lambda: _configure(library, config, Order(capabilities=("8.6",)), "here"))
told["builder"] = refusal(lambda: build(library, pathlib.Path("a.onnx"), pathlib.Path(), Order(), "none"))
print(json.dumps(told))
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pybind11_stubgen") is None, reason="needs pybind11-stubgen, of the extra dev"
)


@dataclass(frozen=True)
class Product:
    """One of the products: its bindings, and stubs of them with a cache of mypy beside."""

    name: str
    bindings: Bindings
    stubs: Path
    cache: Path


def product(name: str, folder: Path, environment: dict[str, str]) -> Product:
    if name == RTX:
        bindings = Bindings("tensorrt_rtx_bindings", environment)
    else:
        if sys.platform != "linux" or shutil.which("cc") is None:
            pytest.skip("needs Linux and a C compiler, cc")
        (folder / "bindings").mkdir()
        bindings = fetch(name, environment.get(WHEELS), folder / "bindings", environment)
    (folder / "stubs").mkdir()
    generate(bindings, folder / "stubs")
    return Product(name, bindings, folder / "stubs", folder / "cache")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(TEN, marks=pytest.mark.network),
        pytest.param(ELEVEN, marks=pytest.mark.network),
        pytest.param(
            RTX,
            marks=pytest.mark.skipif(
                importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="needs the extra tensorrt-rtx"
            ),
        ),
    ],
)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, machine_environment: dict[str, str]
) -> Product:
    return product(request.param, tmp_path_factory.mktemp("trt"), machine_environment)


def test_every_call_is_one_that_the_library_has(made: Product, root: Path) -> None:
    assert errors(root, made.stubs, made.cache) == {}


def test_calls_that_it_does_not_have_are_found(made: Product, root: Path) -> None:
    """Without this a check that knows no types at all would pass, too."""
    found = errors(root, made.stubs, made.cache, MISTAKES)
    assert set(found) == {mistake.wrong for mistake in MISTAKES if made.name in mistake.refused_by}


@pytest.mark.network
@pytest.mark.parametrize("version", [TEN, ELEVEN])
def test_options_are_those_of_the_version_and_a_library_that_does_not_start_is_named(
    version: str, root: Path, tmp_path: Path, machine_environment: dict[str, str]
) -> None:
    """What types cannot say: names that are looked up, with the true enumerations; nothing is built."""
    bindings = product(version, tmp_path, machine_environment).bindings
    found = {**bindings.environment, "PYTHONPATH": os.pathsep.join([bindings.environment["PYTHONPATH"], str(root)])}
    done = subprocess.run([sys.executable, "-c", CONFIGURED], env=found, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"] == version
    strip = "WEIGHTLESS" if version == TEN else "STRIP_PLAN"  # one flag, with two names there
    common = ["VERSION_COMPATIBLE", "SPARSE_WEIGHTS", strip]
    assert [set(flags) for flags in told["flags"]] == [{*common, "REFIT"}, {*common, "REFIT_IDENTICAL"}]
    assert told["levels"] == ["AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"]
    assert told["error"] == "broken"
    assert told["elsewhere"].startswith("here: builds for the device that is here alone; got 8.6. Use the target")
    assert told["builder"].startswith(f"TensorRT {version}: its builder does not start: ")
