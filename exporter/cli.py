"""The command line: thin, loads nothing heavy until a command needs it, and turns every error into a sentence."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from exporter import __version__
from exporter.cli_looking import JsonOption, looking, show
from exporter.errors import ExporterError, Interrupted

app = typer.Typer(
    name="exporter",
    help="Prune, export, compile and prove diffusion models for edge devices: one recipe, one command.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key, such as sampling.steps=10 or stages[0].prune.keep_ratio=0.5."
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder of the run. Default: runs/NAME.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]


def main() -> None:
    """Run the command line; exit 0 fine, 1 our bug, 2 input, 3 gate, 4 tool missing, 5 target failed, 130 Ctrl-C."""
    _quiet_libraries()
    try:
        code = app(standalone_mode=False)  # what a command exits with comes back as a number
    except ExporterError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = Interrupted.exit_code
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of the command line itself
            sys.stderr.write(f"{error.format_message()}\nTry `exporter --help`.\n")
            sys.exit(2)
        traceback.print_exc()
        sys.stderr.write(f"exporter {__version__}: this is a bug of ours, not yours. Please report the lines above.\n")
        sys.exit(1)
    if code == Interrupted.exit_code:
        sys.stderr.write("\nStopped. What was finished stays: the same command continues from there.\n")
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"diffusion-exporter {__version__}")
        raise typer.Exit


@app.command()
def run(  # noqa: PLR0913 - a command line's flags
    recipe: RecipeArgument,
    out: OutOption = None,
    settings: SetOption = None,
    until: Annotated[
        str | None,
        typer.Option(help="Stop after a state (such as 1-pruned), or after prune, tune, export or compile."),
    ] = None,
    targets: Annotated[str | None, typer.Option(help="Only these targets of the recipe, comma-separated.")] = None,
    states: Annotated[str | None, typer.Option(help="Measure only these states, comma-separated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the plan; write nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file of the source and of reused artifacts.")
    ] = False,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Measure every cell, also those that nothing has changed for.")
    ] = False,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Start although memory is expected to run out; the report says so.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Carry out a recipe: states, engines, measurements, gates, report. The same command resumes."""
    from exporter.preflight import check_recipe
    from exporter.recipe import read_recipe, recipe_path

    path = recipe_path(recipe)
    parsed = read_recipe(path, settings or ())
    folder = out or Path("runs") / parsed.name
    only, measured = _names(targets), _names(states)
    if dry_run:
        plan = check_recipe(parsed, folder, until=until, targets=only, states=measured, ignore_memory=ignore_memory)
        show(plan.to_json(), plan.text(), as_json)
        plan.raise_problems()
        return
    from exporter.run import run_recipe

    record = run_recipe(
        parsed,
        folder,
        verify=verify,
        measure_again=measure_again,
        progress=_progress(quiet),
        until=until,
        targets=only,
        states=measured,
        ignore_memory=ignore_memory,
    )
    _tell(record, folder, as_json)
    raise typer.Exit(record.exit_code)


@app.command()
def check(
    recipe: RecipeArgument, out: OutOption = None, settings: SetOption = None, as_json: JsonOption = False
) -> None:
    """Check a recipe against this machine and estimate memory, disk and time, before any work."""
    from exporter.preflight import check_file
    from exporter.recipe import recipe_path

    plan = check_file(recipe_path(recipe), settings or (), out)
    show(plan.to_json(), plan.text(), as_json)
    plan.raise_problems()


@app.command()
def init(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a checkpoint file, owner/name@commit, reference:shapes.")
    ],
    device: Annotated[str, typer.Option("--device", help="cpu, laptop or phone.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The recipe to write.")] = Path("recipe.yaml"),
    config: Annotated[str | None, typer.Option("--config", help="Of a checkpoint file: folder of configs.")] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="Of the weight files, such as fp16.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a commented recipe for a source and a device, checked against this machine."""
    from exporter.drafting import summary, write_draft

    plan = write_draft(source, device, out, config=config, variant=variant)
    show(summary(plan, out), f"{plan.text()}\n{out}: written and checked. Next: exporter run {out}", as_json)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A state, an engine, or the folder of a run.")],
    as_json: JsonOption = False,
) -> None:
    """Verify an artifact, every byte of it, and show what it is."""
    from exporter.inspection import inspect_folder

    found = inspect_folder(folder)
    show(found.data, found.text, as_json)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run.")], as_json: JsonOption = False) -> None:
    """Render report.html and junit.xml again from report.json, and print the summary."""
    from exporter.report.writing import read_record, write_reports

    record = read_record(folder)
    write_reports(record, folder)
    _tell(record, folder, as_json)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run, or its report.json.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
    as_json: JsonOption = False,
) -> None:
    """Show two runs side by side; what must not be compared is said beside the numbers."""
    from exporter.report.comparison import compare as compare_records
    from exporter.report.comparison_text import render_comparison
    from exporter.report.writing import read_record, strict

    found = compare_records(read_record(a), read_record(b))
    show(strict(found.to_json()), render_comparison(found, (str(a), str(b))), as_json)


@app.command()
def generate(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE_DIR", help="OUT/engines/STATE/TARGET")],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.")] = Path("image.png"),
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the recipe's.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale. Default: the recipe's.")] = None,
) -> None:
    """Make one image through the engines."""
    from exporter.generation import generate_image

    for note in generate_image(engine, prompt, out, seed=seed, steps=steps, guidance=guidance):
        typer.echo(note)


bench_app = typer.Typer(help="Compare methods with each other.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@bench_app.command(name="pruners")
def bench_pruners(  # noqa: PLR0913 - a command line's flags
    out: Annotated[Path, typer.Option("--out", help="Folder of the bench; the same command resumes.")] = Path(
        "runs/bench-pruners"
    ),
    methods: Annotated[str | None, typer.Option(help="Only these lines of the table, comma-separated.")] = None,
    latencies: Annotated[str, typer.Option(help="Fractions of dense's latency, comma-separated.")] = "0.75,0.5",
    images: Annotated[int, typer.Option(min=16, max=2048, help="Prompts that are drawn and judged.")] = 2048,
    long_images: Annotated[int, typer.Option(min=16, max=2048, help="The same after the long recovery.")] = 2048,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds before recovery, and after the long one.")] = 3,
    recovery: Annotated[int, typer.Option(min=0, help="Optimizer steps of recovery.")] = 300,
    long_recovery: Annotated[int, typer.Option(min=0, help="Of the best two at the lowest latency.")] = 5000,
    quiet: QuietOption = False,
) -> None:
    """Run every pruning method on the embedded model, at the same measured latency, with the same recovery."""
    from exporter.pruner_bench import compare_pruners

    text = compare_pruners(
        out,
        names=_names(methods),
        latencies=latencies,
        images=(images, long_images),
        seeds=seeds,
        recovery=(recovery, long_recovery),
        progress=_progress(quiet),
    )
    typer.echo(text)


@app.command()
def kit(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    target: Annotated[str, typer.Option("--target", help="The recipe's name of it.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to make. Default: RUN/kits/TARGET.")] = None,
    states: Annotated[str | None, typer.Option(help="Only these states beside dense, comma-separated.")] = None,
    quiet: QuietOption = False,
) -> None:
    """Write a folder that builds, checks and times a target's engines on a host without this package."""
    from exporter.elsewhere.kit import write_kit

    place = out or folder / "kits" / target
    write_kit(folder, target, place, _progress(quiet), _names(states))
    typer.echo(f"{place}: written. Take it to the host and follow README.txt; then exporter merge {folder} result.json")


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run that the kit was made of.")],
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="result.json of the host.")],
    as_json: JsonOption = False,
) -> None:
    """Take what a host measured into the report, as a column of its own that the gates hold for too."""
    from exporter.elsewhere.merged import merge as take_in

    record = take_in(folder, result)
    _tell(record, folder, as_json)
    raise typer.Exit(record.exit_code)


app.add_typer(looking)  # their commands stand beside the others


@app.command(name="random")
def write_random(  # noqa: PLR0913 - a command line's flags
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    family: Annotated[
        str,
        typer.Option(
            "--family", help="sd15, sd21, sdxl, lcm, sd3-medium, flux, pixart, dit or ddpm.", show_default=False
        ),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights: the same one gives the same files.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A few thousand weights instead of the real size.")] = False,
    safety_checker: Annotated[bool, typer.Option("--safety-checker", help="With the safety checker.")] = False,
    shard_mib: Annotated[int, typer.Option(min=1, help="Largest weight file, in MiB.")] = 4096,
    quiet: QuietOption = False,
) -> None:
    """Write a pipeline of a real architecture with random weights, to size a device before the real ones are there."""
    from exporter.random_weights.families import family as family_of

    wanted = family_of(family, tiny=tiny, safety_checker=safety_checker)
    from exporter.random_weights.writing import write_random as write

    made = write(wanted, out, seed=seed, progress=_progress(quiet), shard_bytes=shard_mib * 2**20)
    for folder, count in made.parameters.items():
        typer.echo(f"{folder:<16}{count / 1e6:10.2f} M parameters")
    typer.echo(f"{made.folder}: {made.pipeline} as {wanted.like}, {made.size_bytes / 1e6:.0f} MB of fp16 weights")


@app.command()
def gc(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what no state or engine of the run uses any more: old lowered files, recordings, scratch."""
    from exporter.collection import collect

    removed = collect(folder, dry_run=dry_run)
    verb = "Would free" if dry_run else "Freed"
    lines = [*(f"{item['path']}  {item['bytes'] / 1e6:.1f} MB" for item in removed)]
    lines.append(f"{verb} {sum(item['bytes'] for item in removed) / 1e6:.1f} MB in {len(removed)} folders.")
    show(removed, "\n".join(lines), as_json)


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text is not None else None


def _progress(quiet: bool) -> Any:
    from exporter.progress import Lines, Silent

    return Silent() if quiet else Lines()


def _tell(record: Any, folder: Path, as_json: bool) -> None:
    from exporter.report.text import render_text
    from exporter.report.writing import dump_record

    typer.echo(dump_record(record) if as_json else f"{render_text(record)}\nReport: {folder / 'report.html'}")


def _quiet_libraries() -> None:
    """Keep other libraries' chatter out of our output; theirs to say goes to the log at warning level."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
