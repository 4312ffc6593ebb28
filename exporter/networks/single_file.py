"""A checkpoint that is one safetensors file: checked, and turned into pipeline folders by diffusers' own conversion.

The file holds weights only; everything else comes from a local folder, never from a network.
"""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import SourceError
from exporter.memo import FileMemo
from exporter.networks.components import NETWORK_CLASSES, PIPELINE_CLASSES, class_from, present_components
from exporter.networks.probe import FORWARD_FAILURES
from exporter.networks.weights import PRECISIONS, check_finite_files, read_headers, read_object

_NOT_OF_NETWORKS = "model_ema."
_ONE_FILE = "1000GB"


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores its numbers.

    Attributes:
        precision: safetensors' name of the widest type; everything is converted in it, so that nothing is lost.
        width: its bytes.
    """

    precision: str
    width: int


def refuse_pickles(path: Path) -> None:
    """Raise SourceError for a checkpoint file that is not safetensors, by its name alone."""
    if path.suffix != ".safetensors":
        raise SourceError(
            f"{path}: a single file may be pickled, which can run code; expected a file ending in .safetensors. Where "
            "you trust it, convert it with diffusers: from_single_file(file).save_pretrained(folder)."
        )


def check_single_file(path: Path, pipeline_class: str, memo: FileMemo | None = None) -> Stored:
    """Check what can be known of a checkpoint from its header and numbers.

    Args:
        path: the file.
        pipeline_class: of the config folder beside it.
        memo: what is known of files.

    Raises:
        SourceError: not safetensors, damaged, not finite, a LoRA, or of a family that has no single-file form.
    """
    refuse_pickles(path)
    facts = read_headers([path], SourceError)
    if any(".lora_" in name or "_lora." in name or ".lora." in name for name in facts):
        raise SourceError(f"{path}: a LoRA, not a model. Give the model as source, and this under source.loras.")
    if not hasattr(class_from(PIPELINE_CLASSES, pipeline_class, str(path)), "from_single_file"):
        raise SourceError(f"{path}: {pipeline_class} has no single-file form. Give a pipeline folder as source.path.")
    check_finite_files([path], memo)
    # Entries without a dot are schedules of the training, which pipelines do not read.
    used = {fact.dtype for name, fact in facts.items() if "." in name and not name.startswith(_NOT_OF_NETWORKS)}
    unknown = [name for name in used if name.startswith(("F", "BF")) and name not in PRECISIONS]
    if unknown:
        raise SourceError(
            f"{path}: unsupported number type; got {', '.join(sorted(unknown))}, expected one of "
            f"{', '.join(PRECISIONS)}."
        )
    known = used & PRECISIONS.keys()
    precision = next(iter(known)) if len(known) == 1 else "F32"
    return Stored(precision, PRECISIONS[precision].itemsize)


def convert_single_file(path: Path, config: Path, precision: str, pipeline_class: str, out: Path) -> None:
    """Write the networks of a checkpoint as component folders, with the configs of the config folder.

    Args:
        path: the checkpoint, as checked by `check_single_file`.
        config: folder with `model_index.json`, a config per component, tokenizers and scheduler.
        precision: a key of `PRECISIONS`.
        pipeline_class: of the config folder.
        out: an existing folder.

    Raises:
        SourceError: the file does not hold the networks that the configs describe.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    cls = class_from(PIPELINE_CLASSES, pipeline_class, str(config))
    parts = present_components(pipeline_class, read_object(config / "model_index.json", SourceError))
    takes = inspect.signature(cls.__init__).parameters
    options = dict.fromkeys(name for name in ("safety_checker", "feature_extractor", "image_encoder") if name in takes)
    try:
        pipeline = cls.from_single_file(
            str(path), config=str(config), local_files_only=True, torch_dtype=PRECISIONS[precision], **options
        )
    except (*FORWARD_FAILURES, OSError, SingleFileComponentError) as error:
        what = str(error).split("\n", 1)[0][:200]
        raise SourceError(
            f"{path}: does not hold the networks of {config}; got {type(error).__name__}: {what}. Give the checkpoint "
            "and the configs of the same model."
        ) from error
    for part in parts:
        folder = out / part.folder
        network = getattr(pipeline, part.folder)
        if type(network).__name__ != part.cls:
            raise SourceError(f"{path}: {part.folder}: got {type(network).__name__}, expected {part.cls}.")
        network.save_pretrained(folder, safe_serialization=True, max_shard_size=_ONE_FILE)
        if NETWORK_CLASSES[part.cls].startswith("transformers:"):
            (folder / "generation_config.json").unlink(missing_ok=True)
        shutil.copyfile(config / part.folder / "config.json", folder / "config.json")
