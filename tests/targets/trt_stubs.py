"""Type information of TensorRT, made from its Python bindings, and what mypy says of our calls by it.

The bindings are on ordinary package registries, the library is not: it is stood in for by empty functions, which is
enough to import the bindings and to read every class and signature. All of it is proprietary and stays in the folders
that are given here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""All that the bindings of 10.16 and 11.4 leave undefined."""
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
OURS = ("nvidia.py", "trt.py", "trt_build.py", "trt_session.py", "trt_told.py")


@dataclass(frozen=True)
class Bindings:
    """Python bindings that can be imported: the package, and the environment of a process that imports it."""

    package: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Mistake:
    """A wrong call: what it replaces, in which of our files, and the products that do not take it."""

    file: str
    right: str
    wrong: str
    refused_by: frozenset[str]


def fetch(version: str, wheels: str | None, folder: Path, environment: dict[str, str]) -> Bindings:
    """Get the bindings of a version of TensorRT, and a library for them that does nothing.

    Args:
        version: of the distribution ``tensorrt-cu13-bindings``.
        wheels: a folder that holds its wheel; None for the package registry.
        folder: an empty one.
        environment: of this machine, for pip and the compiler.
    """
    source = [] if wheels is None else ["--no-index", "--find-links", wheels]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *source]
    _run([*command, "--dest", str(folder), f"tensorrt-cu13-bindings=={version}"], folder, environment)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    code = folder / "empty.c"
    code.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS), encoding="utf-8")
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.partition('.')[0]}"
        _run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name, code.name], folder, environment)
    return Bindings("tensorrt_bindings", _before(_before(environment, "LD_LIBRARY_PATH", folder), "PYTHONPATH", folder))


def generate(bindings: Bindings, folder: Path) -> None:
    """Write stubs of the bindings into a folder, under the name by which our code knows every product: tensorrt."""
    command = [sys.executable, "-W", "ignore", "-m", "pybind11_stubgen", bindings.package, "--output-dir", str(folder)]
    _run(command, folder, bindings.environment)
    for stub in (folder / bindings.package).glob("*.pyi"):
        stub.write_text(_cleaned(stub.read_text(encoding="utf-8")), encoding="utf-8")
    whole = f"from {bindings.package} import *\nfrom {bindings.package} import __version__ as __version__\n"
    (folder / "tensorrt.pyi").write_text(whole, encoding="utf-8")
    lines = ["[mypy]", "check_untyped_defs = True", "follow_imports = silent"]
    lines += [f"[mypy-{bindings.package}.*]", "ignore_errors = True"]  # a stub need not be sound to be of use
    lines += ["[mypy-tensorrt_rtx_libs]", "ignore_missing_imports = True"]
    (folder / "mypy.ini").write_text("\n".join(lines) + "\n", encoding="utf-8")


def errors(root: Path, stubs: Path, cache: Path, mistakes: tuple[Mistake, ...] = ()) -> dict[str, str]:
    """Check our target against stubs, with what was called `library` replaced by the module that it is.

    Args:
        root: of the repository.
        stubs: of one product; our files are copied there.
        cache: of mypy, which most of the time goes into.
        mistakes: put into the copies first.

    Returns:
        What mypy says, by place: ``trt_build.py:12``, or the wrong call of a mistake where it is in that line.
    """
    folder = stubs / "targets"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "targets", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in OURS:
        text = (folder / name).read_text(encoding="utf-8")
        for mistake in (mistake for mistake in mistakes if mistake.file == name):
            assert text.count(mistake.right) == 1, f"{name}: {mistake.right!r} is not there once"
            text = text.replace(mistake.right, mistake.wrong)
        (folder / name).write_text(_of_module(text), encoding="utf-8")
    files = [f"targets/{name}" for name in OURS]
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(cache), *files]
    done = subprocess.run(command, cwd=stubs, capture_output=True, text=True, check=False)
    found = re.findall(r"^targets/(\w+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    told = re.search(r"Found (\d+) error|Success: no issues found", done.stdout)
    assert told is not None, done.stdout + done.stderr
    assert int(told.group(1) or 0) == len(found), done.stdout
    return {_place(folder, name, int(line), mistakes): message for name, line, message in found}


def _place(folder: Path, name: str, line: int, mistakes: tuple[Mistake, ...]) -> str:
    text = (folder / name).read_text(encoding="utf-8").splitlines()[line - 1]
    for mistake in mistakes:
        if mistake.file == name and _of_module(mistake.wrong) in text:
            return mistake.wrong
    return f"{name}:{line}"


def _of_module(text: str) -> str:
    """Return source in which a module that is handed around is the imported one, whose types mypy then knows."""
    text = re.sub(r"  # type: ignore.*", "", text)
    text = re.sub(r"(?<![\w.])(?:self\._)?library(?=[.,)])", "tensorrt", text)
    return text.replace("import annotations\n", "import annotations; import tensorrt\n")  # lines keep their numbers


def _cleaned(text: str) -> str:
    """Return a stub that is Python, and says what pybind11 does and the stub's generator does not know."""
    text = re.sub(r"([(,] ?)in: ", r"\1in_: ", text)  # a parameter
    text = text.replace("typing.SupportsInt", "int").replace("typing.SupportsFloat", "float")  # what callbacks get
    text = re.sub(r"(= None, \w+: int)(?=\))", r"\1 = 0", text)  # a parameter without a default after one that has it
    text = re.sub(r"^bool: .*$", "", text, flags=re.MULTILINE)  # a type of tensors, which hides Python's own
    text = text.replace("get_error(self, index: int) -> ...:", "get_error(self, index: int) -> ParserError:")
    text = text.replace("    profiler: IProfiler\n", "    profiler: IProfiler | None\n")
    for name, method in (
        ("Dims", "__iter__(self) -> collections.abc.Iterator[int]"),
        ("IHostMemory", "__buffer__(self, flags: int, /) -> memoryview"),
    ):
        text = text.replace(f"class {name}:\n", f"class {name}:\n    def {method}: ...\n")
    return text


def _before(environment: dict[str, str], variable: str, folder: Path) -> dict[str, str]:
    """Return an environment in which a folder is the first of those that a variable lists."""
    rest = [environment[variable]] if environment.get(variable) else []
    return {**environment, variable: ":".join([str(folder), *rest])}


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
