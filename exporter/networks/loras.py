"""LoRAs, read from safetensors and added to the weights they were trained for, before anything else happens to those.

Names as diffusers, peft, kohya's scripts and the models' authors write them are understood; whatever is left over is
refused by name.

Source: LoRA (arXiv 2106.09685), section 4.1: ``W + alpha / rank * B A``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from exporter.errors import SourceError
from exporter.memo import FileMemo
from exporter.networks.original_names import original_names
from exporter.networks.original_transformers import Piece, original_pieces
from exporter.networks.weights import is_finite, opened, present_names, read_headers, weight_files

FUSED = "_fused_loras"
"""Key of `model_index.json` that says which LoRAs the weights hold already; libraries skip keys with an underscore."""

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Component folder to tensor name to shape."""

_PAIR = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<peft>A|B)(?:\.default)?|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old>down|up)"
    r"|\.lora_(?P<kohya>down|up))\.weight"
)
_ALPHA = re.compile(r"(?P<module>.+?)(?:(?:\.lora|\.lora_linear_layer)?\.(?:down|up)\.weight)?\.alpha")
_KOHYA = {
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),  # T5, which is Flux's second
}
_KINDS = {
    "DoRA": ("lora_magnitude_vector", "dora_scale"),
    "LoHa": ("hada_",),
    "LoKr": ("lokr_",),
    "OFT": ("oft_", "boft_"),
    "IA3": ("ia3_l",),
    "LoCon with a core (Tucker)": ("lora_mid",),
}
"""Adapters that are no plain LoRA, and what their tensors are called."""
_SHOWN = 4


@dataclass(frozen=True)
class Lora:
    """One LoRA of a recipe.

    Attributes:
        path: a safetensors file.
        weight: how much of it is added; 1 is as trained.
        sha256: of the file, so that what was fused can be told.
    """

    path: str
    weight: float
    sha256: str


@dataclass
class Pair:
    """The two factors of one module's update, by their names in the file, and alpha where there is one."""

    down: str = ""
    up: str = ""
    alpha: float | None = None


@dataclass(frozen=True)
class Update:
    """One pair, and which rows of it are added to which rows of the tensor it belongs to."""

    file: Path
    pair: Pair
    scale: float
    rows: Piece


@dataclass(frozen=True)
class _Target:
    """What a module of a LoRA is in the model: in one folder, one tensor or rows of several."""

    folder: str
    pieces: tuple[Piece, ...]


@dataclass
class _Read:
    """What a file holds, by module."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def find_lora(path: str, weight: float, place: str, memo: FileMemo | None = None) -> Lora:
    """Return a LoRA of the recipe after checking that its file is one.

    Args:
        path: as written in the recipe.
        weight: as written in the recipe.
        place: key path for messages, such as ``source.loras[0]``.
        memo: what is known of files.

    Raises:
        SourceError: no such file, pickled, damaged, or not finite.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise SourceError(f"{place}: no such file; got {path}, expected a safetensors file. Check the path.")
    if file.suffix != ".safetensors":
        raise SourceError(
            f"{place}: {file.name} may be pickled, which can run code; expected a file ending in .safetensors."
        )
    memo = memo or FileMemo()
    memo.recall(file, "finite", lambda: _check_finite(file, place))
    return Lora(str(file), weight, memo.sha256(file))


def _check_finite(file: Path, place: str) -> bool:
    with opened(file, SourceError) as handle:
        for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
            if not is_finite(handle.get_tensor(name)):
                raise SourceError(f"{place}: NaN or infinite weights in {name!r}. Use an intact copy of the LoRA.")
    return True


def plan_fuse(loras: tuple[Lora, ...], shapes: Shapes, index: Mapping[str, Any]) -> dict[str, dict[str, list[Update]]]:
    """Return which tensors change, by component folder and name.

    Args:
        loras: in the order in which they are added.
        shapes: of the source's networks.
        index: the source's `model_index.json`.

    Raises:
        SourceError: a LoRA does not fit, is there twice, or the source holds fused LoRAs already.
    """
    already = index.get(FUSED)
    if loras and already:
        names = ", ".join(str(entry.get("file")) for entry in already if isinstance(entry, Mapping))
        raise SourceError(
            f"source.loras: the source's weights hold LoRAs already; got {names}. A second fuse is refused: give the "
            "original model, and list all LoRAs in one recipe."
        )
    digests = [lora.sha256 for lora in loras]
    for number, digest in enumerate(digests):
        if digest in digests[:number]:
            raise SourceError(f"source.loras[{number}]: the same LoRA as source.loras[{digests.index(digest)}].")
    plan: dict[str, dict[str, list[Update]]] = {}
    for number, lora in enumerate(loras):
        _plan_one(lora, f"source.loras[{number}]", shapes, plan)
    return plan


def _plan_one(lora: Lora, place: str, shapes: Shapes, plan: dict[str, dict[str, list[Update]]]) -> None:
    path = Path(lora.path)
    facts = {name: fact.shape for name, fact in read_headers([path], SourceError).items()}
    with opened(path, SourceError) as handle:
        scalars = {name: float(handle.get_tensor(name)) for name, shape in facts.items() if math.prod(shape) == 1}
        metadata = _adapter_metadata(handle.metadata() or {}, place)
    read = _pairs_of(facts, scalars)
    if read.left:
        _refuse(place, path, read.left, _what_else(read.left))
    targets = _targets(shapes)
    strange = [module for module in read.pairs if _lookup(module, targets) is None]
    if strange or not read.pairs:
        _refuse(place, path, strange or sorted(facts), "name modules that the model does not have")
    for module, pair in read.pairs.items():
        target = _lookup(module, targets) or _Target("", ())
        weights = [shapes[target.folder][f"{piece.module}.weight"] for piece in target.pieces]
        total = sum(piece.rows for piece in target.pieces)
        rank = _checked_rank(pair, facts, (total, *weights[0][1:]), f"{place}: {path.name}")
        scale = lora.weight * (pair.alpha if pair.alpha is not None else _alpha_in(metadata, module, rank)) / rank
        for piece in target.pieces:
            updates = plan.setdefault(target.folder, {}).setdefault(f"{piece.module}.weight", [])
            updates.append(Update(path, pair, scale, piece))


def _what_else(keys: list[str]) -> str:
    """Return what tensors are that belong to no pair."""
    kinds = [kind for kind, words in _KINDS.items() if any(word in key for key in keys for word in words)]
    if kinds:
        return f"make it a {' and '.join(kinds)}, and only plain LoRAs are supported"
    return "are no LoRA pairs (DoRA, LoHa, LoKr and the like are not supported)"


def _refuse(place: str, path: Path, keys: list[str], what: str) -> None:
    shown = ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
    raise SourceError(
        f"{place}: {path.name} does not fit; {len(keys)} of its keys {what}: {shown}. Use a LoRA made for this model."
    )


def _pairs_of(facts: Mapping[str, tuple[int, ...]], scalars: Mapping[str, float]) -> _Read:
    read = _Read()
    for name in sorted(facts):
        pair, alpha = _PAIR.fullmatch(name), _ALPHA.fullmatch(name)
        if pair:
            entry = read.pairs.setdefault(pair["module"], Pair())
            is_down = (pair["peft"] or pair["old"] or pair["kohya"]) in ("A", "down")
            entry.down, entry.up = (name, entry.up) if is_down else (entry.down, name)
        elif alpha and name in scalars:
            read.pairs.setdefault(alpha["module"], Pair()).alpha = scalars[name]
        else:
            read.left.append(name)
    read.left += [f"{module} (half a pair)" for module, pair in read.pairs.items() if not (pair.down and pair.up)]
    return read


def _targets(shapes: Shapes) -> dict[str, _Target]:
    """Return every name that a module with a weight may go by: dotted, as in kohya's scripts, and without a prefix."""
    found: dict[str, _Target] = {}
    denoiser = next((folder for folder in ("unet", "transformer") if folder in shapes), "")
    for folder, names in shapes.items():
        kohya = [prefix for prefix, owners in _KOHYA.items() if folder == next((o for o in owners if o in shapes), "")]
        dotted = [f"{folder}."]
        if folder == denoiser:
            kohya += ["lora_unet_", "lora_transformer_"]
            dotted += ["", "diffusion_model.", "model.diffusion_model."]
        for path, pieces in _paths(folder, names).items():
            target = _Target(folder, pieces)
            found |= {f"{prefix}{path}": target for prefix in dotted}
            found |= {f"{prefix}{path.replace('.', '_')}": target for prefix in kohya}
    return found


def _paths(folder: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Piece, ...]]:
    """Return the modules of one network that can be updated, by each of their names in it."""
    rows = {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if name.endswith(".weight")}
    wide = {module for module in rows if len(shapes[f"{module}.weight"]) > 1}
    found = {
        original: pieces
        for original, pieces in original_pieces(rows).items()
        if all(piece.module in wide for piece in pieces)
    }
    numbered = original_names(rows) if folder == "unet" else {}
    for module in wide:
        paths = [module]
        if folder.startswith("text_encoder"):  # transformers 5 leaves the prefix out, the files of before have it
            paths += [f"text_model.{module}", module.removeprefix("text_model.")]
        paths += [numbered[module]] if module in numbered else []
        found |= dict.fromkeys(paths, (Piece(module, 0, rows[module]),))
    return found


def _lookup(module: str, targets: Mapping[str, _Target]) -> _Target | None:
    plain = module.replace(".processor.", ".").replace(".base_model.model.", ".")
    return targets.get(plain) or targets.get(f"{plain}.0")  # `to_out` was once written without its index


def _checked_rank(pair: Pair, facts: Mapping[str, tuple[int, ...]], weight: tuple[int, ...], place: str) -> int:
    down, up = facts[pair.down], facts[pair.up]
    rank = down[0] if down else 0
    fits = len(down) >= 2 and len(up) >= 2 and rank > 0 and up[1] == rank
    fits = fits and up[0] == weight[0] and math.prod(up[2:]) == 1 and math.prod(down[1:]) == math.prod(weight[1:])
    if not fits:
        raise SourceError(
            f"{place} does not fit; {pair.down} and {pair.up} have shapes {list(down)} and {list(up)}, which make no "
            f"update of a weight of shape {list(weight)}. Use a LoRA made for this model."
        )
    return rank


def _adapter_metadata(metadata: Mapping[str, str], place: str) -> dict[str, Any]:
    """Return what diffusers keeps of peft's options in the file's header."""
    try:
        found = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise SourceError(f"{place}: its lora_adapter_metadata is not JSON. Use an intact copy.") from error
    options: dict[str, Any] = found if isinstance(found, dict) else {}
    other = [key for key in options if key.rpartition(".")[2] in ("use_dora", "use_rslora") and options[key]]
    if other:
        raise SourceError(
            f"{place}: not a plain LoRA; got {', '.join(other)}. Fuse it with peft, then give the result."
        )
    return options


def _alpha_in(metadata: Mapping[str, Any], module: str, rank: int) -> float:
    component, _, path = module.partition(".")
    patterns = metadata.get(f"{component}.alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if path == pattern or path.endswith(f".{pattern}"):
            return float(alpha)
    return float(metadata.get(f"{component}.lora_alpha", rank))


def fuse(folder: Path, cls: str, updates: Mapping[str, list[Update]]) -> None:
    """Add updates to the weights of one component folder, in float32, and store them in their own precision.

    Args:
        folder: of the component; its weight files are replaced.
        cls: its network class.
        updates: from `plan_fuse`.

    Raises:
        SourceError: a weight is not finite afterwards.
    """
    for path in weight_files(folder, cls):
        facts = present_names(cls, read_headers([path]))
        changed = {fact.stored: updates[name] for name, fact in facts.items() if name in updates}
        if not changed:
            continue
        with opened(path, SourceError) as handle:
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no mapping
        for name, parts in changed.items():
            state[name] = _updated(state[name], parts, f"{folder.name}: {name}")
        fresh = path.with_name(f"{path.name}.fused")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, fresh, metadata={"format": "pt"})
        fresh.replace(path)


def _updated(weight: Tensor, parts: list[Update], place: str) -> Tensor:
    total = weight.to(torch.float32, copy=True)
    for part in parts:
        with opened(part.file, SourceError) as handle:
            down = handle.get_tensor(part.pair.down).float().flatten(1)
            up = handle.get_tensor(part.pair.up).float().flatten(1)
        rows = part.rows
        update = (up[rows.start : rows.start + rows.rows] @ down).reshape(rows.rows, *weight.shape[1:])
        total[rows.at : rows.at + rows.rows] += part.scale * update
    fused = total.to(weight.dtype)
    if not is_finite(fused):
        raise SourceError(
            f"{place}: not finite in {weight.dtype} after the LoRAs were added. Lower source.loras[...].weight."
        )
    return fused


def fused_entry(loras: tuple[Lora, ...]) -> list[dict[str, Any]]:
    """Return what `model_index.json` says of fused LoRAs."""
    return [{"file": Path(lora.path).name, "weight": lora.weight, "sha256": lora.sha256} for lora in loras]
