"""Commands that look at something and change nothing: graphs, packages, targets, methods, schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

looking = typer.Typer()
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def show(data: object, text: str, as_json: bool) -> None:
    """Print what a command found, as JSON where that is asked for."""
    typer.echo(json.dumps(data, indent=2) if as_json else text)


@looking.command()
def sparsity(
    graph: Annotated[Path, typer.Argument(help="ONNX file, or a folder that holds model.onnx.")],
    as_json: JsonOption = False,
) -> None:
    """Tell what of a graph sparse kernels could take, weight by weight, with the reasons."""
    from dataclasses import asdict

    from exporter.lowering.sparsity_report import product_share, report_text, sparse_weights

    found = sparse_weights(graph / "model.onnx" if graph.is_dir() else graph)
    data = {"weights": [asdict(item) for item in found], "product_share": product_share(found)}
    show(data, report_text(found), as_json)


@looking.command()
def lint(
    place: Annotated[
        Path, typer.Argument(metavar="PLACE", help="A Core ML engine, a component's folder in it, or an *.mlpackage.")
    ],
    against: Annotated[
        Path | None, typer.Option("--against", help="The same, converted again or of another run: where they part.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what in Core ML packages speaks against the Neural Engine; with --against, where two engines part."""
    from exporter.linting import lint_place

    found = lint_place(place, against)
    show(found.to_json(), found.text(), as_json)


@looking.command(name="targets")
def list_targets(as_json: JsonOption = False) -> None:
    """List target types and what this machine offers for each."""
    from exporter.inspection import target_rows

    rows = target_rows()
    lines = [f"{row['type']:<14}{row['state']:<14}{row['detail']}" for row in rows]
    show(rows, "\n".join(lines), as_json)


@looking.command(name="pruners")
def list_pruners(
    method: Annotated[str | None, typer.Argument(help="What each option of this one means.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List pruning and tuning methods with their options, and which method prunes which family."""
    from exporter.inspection import method_options, method_rows, method_text
    from exporter.pruners.matrix import matrix, matrix_text

    if method is not None:
        found = method_options(method)
        show(found, method_text(found), as_json)
        return
    rows = method_rows()
    lines = []
    for row, following in zip(rows, [*rows[1:], {}], strict=True):
        lines.append(f"{row['stage']:<9}{row['method']:<21}{row['summary']}")
        if row["options"] != following.get("options"):  # schemes share theirs
            lines.append(f"{'':<30}{row['options']}")
    data = {"methods": rows, "families": matrix()}
    show(data, "\n".join([*lines, "", matrix_text()]), as_json)


@looking.command()
def schema(kind: Annotated[str, typer.Argument(help="recipe or report")] = "recipe") -> None:
    """Print the JSON Schema of recipes or of report.json."""
    from exporter.inspection import schema_of

    typer.echo(json.dumps(schema_of(kind), indent=2))
