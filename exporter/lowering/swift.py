"""What Apple's Swift package StableDiffusion loads: names, shapes, files, and a page on compiling them on a Mac.

Names and shapes are those of its sources (``Unet.swift``, ``TextEncoder.swift``, ``Decoder.swift``): one image at a
time, rows without the prompt first, text states channels first, tokens as floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exporter.artifact import link_file, link_tree
from exporter.errors import ComponentFailed
from exporter.lowering.options import ExportOptions
from exporter.networks.components import Component, Role
from targets.coreml.package import MANIFEST, Manifest

FOLDER = "swift"
SWIFT_PORTS: Mapping[Role, Mapping[str, tuple[str, str]]] = {
    "denoiser": {
        "sample": ("sample", "as it is"),
        "timestep": ("timestep", "for each row"),
        "encoder_hidden_states": ("encoder_hidden_states", "channels first"),
        "out_sample": ("noise_pred", ""),
    },
    "text": {
        "input_ids": ("input_ids", "as floats"),
        "last_hidden_state": ("last_hidden_state", ""),
        "pooler_output": ("pooled_outputs", ""),
    },
    "decoder": {"latent_sample": ("z", "as it is"), "sample": ("image", "")},
    "encoder": {"sample": ("z", "as it is"), "latent_parameters": ("latent", "")},
}
"""Role -> input or output -> what the package calls it, and how it takes it."""
_NAMES: Mapping[str, tuple[str, ...]] = {
    "unet": ("Unet", "UnetChunk1", "UnetChunk2"),
    "text_encoder": ("TextEncoder",),
    "vae_decoder": ("VAEDecoder",),
    "vae_encoder": ("VAEEncoder",),
}
"""Component -> name of its package; of a network in two packages the other two."""
_PAGE = """\
# For Apple's Swift package StableDiffusion

These packages have the names and shapes that the package of github.com/apple/ml-stable-diffusion loads. It loads
compiled models, which only a Mac with Xcode makes:

    for package in *.mlpackage; do xcrun coremlcompiler compile "$package" Resources; done
    cp vocab.json merges.txt Resources
    swift run StableDiffusionSample "a prompt" --resource-path Resources --compute-units cpuAndNeuralEngine

Run the last line in a checkout of that package, with the path to `Resources`. For an app, add the folder `Resources`
to it and make a `StableDiffusionPipeline(resourcesAt: url, controlNet: [])`.

Made for {deployment} and newer, {rows} rows per call of the U-Net (without the prompt first), images of {size} pixels.
The scheduler of this model is {scheduler}; choose the one in Swift that fits it. A safety checker is not among these.
What was checked: the packages were evaluated on the machine that made them, against torch. No Mac has run them yet.
"""


def check_swift(component: Component, inputs: tuple[str, ...], rows: int, export: ExportOptions) -> None:
    """Raise ComponentFailed where Apple's package has no place for a component as it is.

    Args:
        component: what is converted.
        inputs: of its network.
        rows: of them.
        export: shapes.
    """
    known = SWIFT_PORTS[component.role]
    strange = [name for name in inputs if name not in known]
    if component.name not in _NAMES or strange:
        got = f"inputs {', '.join(strange)}" if strange else component.name
        raise ComponentFailed(
            f"{component.name}: layout: swift: got {got}, expected the components of Stable Diffusion 1 or 2, which "
            "is all that is laid out for Apple's package. Write layout: plain."
        )
    if export.batch != 1 or (component.role == "denoiser" and rows != 2) or export.dynamic:
        shapes = "open shapes" if export.dynamic else f"{rows} rows"
        raise ComponentFailed(
            f"{component.name}: layout: swift: got {shapes}, expected a batch of one image, with guidance, and fixed "
            "shapes. Write sampling.batch: 1, a guidance above 1, and leave shapes out."
        )


def write_swift(engine: Path, scheduler: str, size: int) -> None:
    """Put links to an engine's packages into a folder of it, under the names that Apple's package looks for.

    Args:
        engine: complete, its components and its tokenizer.
        scheduler: what it is sampled with.
        size: side of an image in pixels.

    Raises:
        ComponentFailed: the tokenizer has no files of the kind that Swift reads.
    """
    folder = engine / FOLDER
    folder.mkdir()
    deployment, rows = "", 0
    for component, names in _NAMES.items():
        if not (engine / component / MANIFEST).is_file():
            continue
        manifest = Manifest.read(engine / component / MANIFEST)
        deployment = manifest.deployment
        rows = max(rows, manifest.inputs[0].shape[0])
        called = names[:1] if len(manifest.packages) == 1 else names[1:]
        for package, name in zip(manifest.packages, called, strict=True):
            link_tree(engine / component / package, folder / f"{name}.mlpackage")
    for name in ("vocab.json", "merges.txt"):
        if not (engine / "tokenizer" / name).is_file():
            raise ComponentFailed(f"tokenizer: layout: swift: got no {name}, expected CLIP's. Write layout: plain.")
        link_file(engine / "tokenizer" / name, folder / name)
    page = _PAGE.format(deployment=deployment, rows=rows, size=size, scheduler=scheduler)
    (folder / "README.md").write_text(page, encoding="utf-8")
