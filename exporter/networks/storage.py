"""Saving a network that no longer matches its config, and loading it with nothing trusted.

A folder holds the untouched original config, the surgery record and the claims of sparsity (where there are any),
safetensors, and a probe: fixed inputs with the recorded outputs. A network without surgery makes a stock folder that
plain `from_pretrained` reads.
"""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.artifact import disk_failure
from exporter.errors import ArtifactError, ComponentFailed, SurgeryError
from exporter.networks.components import NETWORK_CLASSES, class_from, is_named
from exporter.networks.probe import FORWARD_FAILURES, has_probe, probe_inputs, reference_copy, run_probe
from exporter.networks.reading import read_object
from exporter.networks.record import Surgery
from exporter.networks.replay import replay
from exporter.networks.sparsity import Claims, check_claims, load_claims, write_claims
from exporter.networks.weights import (
    WEIGHT_STEMS,
    TensorFact,
    is_finite,
    opened,
    present_names,
    read_headers,
    weight_files,
)

CONFIG, SURGERY, PROBE, TIED = "config.json", "surgery.json", "probe.safetensors", "tied.json"

PROBE_TOLERANCE = 1e-3
"""Largest difference a probe may show, relative to its largest recorded value.

The same weights give the same bits on one machine with one set of versions only: another processor sums in another
order, which moves float32 answers by about 1e-6 to 1e-4 of their range. A wrong edit moves them by 1e-2 and more.
"""

_PROBE_FLOOR = 1e-6
_T5_ALIAS = "encoder.embed_tokens.weight"
_MAX_COUNT = 512
_MAX_SIZE = 2**24
_COUNTS = frozenset(
    {
        "layers_per_block",
        "num_hidden_layers",
        "reverse_transformer_layers_per_block",
        "transformer_layers_per_block",
    }
)

_log = logging.getLogger(__name__)


def save_network(
    module: nn.Module,
    folder: Path,
    *,
    surgery: Surgery,
    original_config: Mapping[str, Any],
    sparsity: Claims | None = None,
) -> None:
    """Write a network into a folder.

    Args:
        module: of a class in `NETWORK_CLASSES`; any device; weights keep their dtype.
        folder: made where missing; its files of these names are overwritten.
        surgery: everything that was done to the network since the original config built it.
        original_config: the config that built it, never adapted to the edits.
        sparsity: which weights have which pattern of zeros.

    Raises:
        SurgeryError: a weight has not the pattern that is claimed.
        ComponentFailed: weights or answers are NaN or infinite, or the disk is full.
    """
    cls = type(module).__name__
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SURGERY, TIED, PROBE):
        (folder / name).unlink(missing_ok=True)
    state, tied = _untied(module)
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise ComponentFailed(
                f"{cls}: the weights are no longer numbers; got NaN or infinity in {name!r}. "
                "Lower the learning rate or cut less."
            )
    check_claims(state, sparsity or {}, cls, SurgeryError)
    _write_json(folder / CONFIG, dict(original_config))
    write_claims(folder, sparsity or {})
    if not surgery.is_empty:
        _write_json(folder / SURGERY, surgery.to_json())
    if tied:
        _write_json(folder / TIED, tied)
    _write_tensors(folder / f"{WEIGHT_STEMS[cls]}.safetensors", state)
    _write_tensors(folder / PROBE, _probe_tensors(module))


@dataclass(frozen=True)
class Bare:
    """A network of a folder before its weights are read.

    Attributes:
        module: edited by the record, parameters on the meta device, constant buffers real.
        surgery: the record.
        facts: name in the state dict -> the stored tensor, compared with the module's shapes.
        tied: further names in the state dict -> the name whose tensor they share.
    """

    module: nn.Module
    surgery: Surgery
    facts: Mapping[str, TensorFact]
    tied: Mapping[str, str]


def open_bare(folder: Path, *, cls: str) -> Bare:
    """Build the network of a folder without reading its weights; see `load_network`, whose first half this is.

    Raises:
        ArtifactError: anything but the weights' bytes is missing, damaged, hostile or does not belong together.
    """
    module = build_network(folder, cls=cls)
    surgery = load_surgery(folder)
    replay(module, surgery, place=str(folder / SURGERY))
    facts = present_names(cls, read_headers(weight_files(folder, cls)))
    tied = _load_tied(folder, module)
    _compare(module, facts, tied, folder)
    return Bare(module, surgery, facts, tied)


def load_network(folder: Path, *, cls: str, dtype: torch.dtype = torch.float32, check_probe: bool = True) -> nn.Module:
    """Load a network from a folder that `save_network` or a stock `save_pretrained` wrote.

    Built from the untouched config without memory for parameters, edited by the record, compared with the headers of
    the weight files, and only then filled.

    Args:
        folder: of the component.
        cls: network class, a key of `NETWORK_CLASSES`.
        dtype: of the weights in memory; the probe is run in float32 before the cast.
        check_probe: whether to compare the recorded answers; a record without a probe is refused then.

    Returns:
        The network in evaluation mode on the CPU.

    Raises:
        ArtifactError: anything in the folder is missing, damaged, hostile or does not belong together.
    """
    bare = open_bare(folder, cls=cls)
    module, surgery = bare.module, bare.surgery
    probed = check_probe and has_probe(module) and ((folder / PROBE).is_file() or not surgery.is_empty)
    _fill(module, bare.facts, bare.tied, torch.float32 if probed else dtype)
    check_claims(module.state_dict(), load_claims(folder), str(folder), ArtifactError)
    module.eval()
    if probed:
        _check_probe(module, folder)
    # The base method: diffusers' own warns of every cast, whether or not there are modules to keep in float32.
    return nn.Module.to(module, dtype)


def load_surgery(folder: Path) -> Surgery:
    """Return the record of a component folder, empty where there is none.

    Raises:
        ArtifactError: the file is not a record.
    """
    path = folder / SURGERY
    if not path.exists():
        return Surgery()
    return Surgery.from_json(read_object(path, ArtifactError), place=str(path))


def build_network(folder: Path, *, cls: str) -> nn.Module:
    """Return the network that `config.json` describes, its parameters on the meta device, its constant buffers real.

    Raises:
        ArtifactError: the config is damaged, of another class or not buildable.
    """
    from accelerate import init_empty_weights  # seconds to import

    network_class = class_from(NETWORK_CLASSES, cls, str(folder))
    config = read_config(folder, cls)
    try:
        with init_empty_weights(include_buffers=False):
            if NETWORK_CLASSES[cls].startswith("transformers:"):
                return cast("nn.Module", network_class(network_class.config_class.from_dict(config)))
            return cast("nn.Module", network_class.from_config(config))
    except FORWARD_FAILURES as error:
        raise ArtifactError(
            f"{folder / CONFIG}: {cls} cannot be built from it; got {type(error).__name__}: {str(error)[:200]}. "
            "Restore the original file."
        ) from error


def read_config(folder: Path, cls: str) -> dict[str, Any]:
    """Return a component's config after checking its class and that its sizes are of this world.

    Raises:
        ArtifactError: it is missing, damaged or of another class.
    """
    path = folder / CONFIG
    config = read_object(path, ArtifactError)
    named = config.get("_class_name") or next(iter(config.get("architectures") or []), cls)
    if not is_named(cls, named):
        raise ArtifactError(
            f"{path}: another class; got {str(named)[:80]!r}, expected {cls!r}. Restore the original file."
        )
    for key, value in config.items():
        limit = _MAX_COUNT if key in _COUNTS else _MAX_SIZE
        if any(isinstance(number, int) and abs(number) > limit for number in _numbers(value)):
            raise ArtifactError(
                f"{path}: {key[:80]}: out of range, expected at most {limit}. Restore the original file."
            )
    return config


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a network, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [number for entry in value for number in _numbers(entry)]
    return [value]


def _untied(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to write, each once, and which further name stands for which of them."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in module.state_dict().items():
        key = (tensor.untyped_storage().data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        state[name] = tensor.detach().to("cpu").contiguous()
    return state, tied


def _write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise disk_failure(path, error) from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        # One metadata entry only: safetensors writes several in random order, and equal networks must give equal files.
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except OSError as error:
        raise disk_failure(path, error) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        cause = OSError(int(number[1]) if number else errno.EIO, str(error))
        raise disk_failure(path, cause) from error


def _probe_tensors(module: nn.Module) -> dict[str, Tensor]:
    subject = reference_copy(module)
    inputs = probe_inputs(subject)
    outputs = run_probe(subject, inputs)
    for name, tensor in outputs.items():
        if not is_finite(tensor):
            raise ComponentFailed(
                f"{type(module).__name__}: its answer is no longer finite; got NaN or infinity in {name}."
            )
    named = {f"input.{k}": v for k, v in inputs.items()} | {f"output.{k}": v for k, v in outputs.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in named.items()}


def _load_tied(folder: Path, module: nn.Module) -> dict[str, str]:
    path = folder / TIED
    if not path.exists():
        # A stock folder has no such file: its library ties by itself.
        return {_T5_ALIAS: "shared.weight"} if _T5_ALIAS in module.state_dict() else {}
    tied, names = read_object(path, ArtifactError), module.state_dict()
    for alias, name in tied.items():
        if alias not in names or not isinstance(name, str) or name not in names or name in tied:
            raise ArtifactError(
                f"{path}: a name that the network does not have; got {alias[:80]!r}. Restore the original file."
            )
    return tied


def _compare(module: nn.Module, facts: Mapping[str, TensorFact], tied: Mapping[str, str], folder: Path) -> None:
    """Compare names and shapes of the network as rebuilt with the headers of its weight files."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in tied}
    for alias, name in tied.items():
        if module.state_dict()[alias].shape != module.state_dict()[name].shape:
            raise ArtifactError(
                f"{folder / TIED}: {alias}: tied to a tensor of another shape. Restore the original file."
            )
    for what, names in (("missing", expected.keys() - facts.keys()), ("unexpected", facts.keys() - expected.keys())):
        if names:
            raise ArtifactError(
                f"{folder}: weights do not belong to config and surgery; got {len(names)} {what} tensors, "
                f"such as {min(names)!r}. Restore the original folder."
            )
    for name, shape in expected.items():
        if facts[name].shape != shape:
            raise ArtifactError(
                f"{facts[name].file}: {name}: weights do not belong to config and surgery; got shape "
                f"{list(facts[name].shape)}, expected {list(shape)}. Restore the original folder."
            )


def _fill(module: nn.Module, facts: Mapping[str, TensorFact], tied: Mapping[str, str], dtype: torch.dtype) -> None:
    """Read the weights and give them to the network; tied names get the very same tensor."""
    state: dict[str, Tensor] = {}
    for path in sorted({fact.file for fact in facts.values()}):
        with opened(path, ArtifactError) as handle:
            for name, fact in facts.items():
                if fact.file == path:
                    tensor = handle.get_tensor(fact.stored)
                    # A copy: the mapped file is aligned to 8 bytes only, which moves answers in the last bit.
                    state[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    module.load_state_dict(state | {alias: state[name] for alias, name in tied.items()}, strict=True, assign=True)
    for alias, name in tied.items():
        (owner, last), (source, first) = _owner(module, alias), _owner(module, name)
        owner._parameters[last] = source._parameters[first]
    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if left:
        raise ArtifactError(f"{type(module).__name__}: no weights for {left[0]!r} and {len(left) - 1} more.")


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def _check_probe(module: nn.Module, folder: Path) -> None:
    path = folder / PROBE
    if not path.is_file():
        raise ArtifactError(f"{path}: missing beside a surgery record. Restore the original folder.")
    recorded = read_headers([path])
    expected = {f"input.{name}": tuple(value.shape) for name, value in probe_inputs(module).items()}
    given = {name: fact.shape for name, fact in recorded.items() if name.startswith("input.")}
    if given != expected:
        raise ArtifactError(
            f"{path}: inputs of another network; got {given}, expected {expected}. Restore the original folder."
        )
    tensors = _tensors(path)
    try:
        answers = run_probe(module, {name.removeprefix("input."): tensors[name] for name in expected})
    except FORWARD_FAILURES as error:
        raise ArtifactError(
            f"{folder.name}: does not run after its surgery; got {type(error).__name__}: {str(error)[:200]}. "
            "Restore the original folder."
        ) from error
    outputs = {name.removeprefix("output."): value for name, value in tensors.items() if name.startswith("output.")}
    if set(outputs) != set(answers):
        raise ArtifactError(f"{path}: other outputs; got {sorted(outputs)}, expected {sorted(answers)}.")
    for name, answer in answers.items():
        _check_close(answer, outputs[name], f"{folder.name}: {name}")


def _tensors(path: Path) -> dict[str, Tensor]:
    with opened(path, ArtifactError) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - the handle is no mapping


def _check_close(answer: Tensor, recorded: Tensor, place: str) -> None:
    if answer.shape != recorded.shape:
        raise ArtifactError(
            f"{place}: the probe has another shape; got {list(answer.shape)}, expected {list(recorded.shape)}. "
            "Restore the original folder."
        )
    limit = PROBE_TOLERANCE * float(recorded.abs().max()) + _PROBE_FLOOR
    error = float((answer - recorded).abs().max())
    _log.debug("%s: probe differs by %.3g, limit %.3g", place, error, limit)
    if not error <= limit:
        raise ArtifactError(
            f"{place}: the network does not answer as when it was saved; got a difference of {error:.3g}, expected at "
            f"most {limit:.3g}. Restore the original folder, or make the state again with these library versions."
        )
