"""Command line: trains the reference model and its judge from a seed, and measures them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from exporter.errors import ExporterError
from exporter.reference import SHAPES
from exporter.reference.train.evaluate import evaluate
from exporter.reference.train.judge import JUDGE_PLAN, train_judge
from exporter.reference.train.report import write_report
from exporter.reference.train.setup import Setup
from exporter.reference.train.stages import DENOISER_PLANS, VAE_PLAN, train_denoiser, train_vae


def _tell(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m exporter.reference.train", description=__doc__)
    parser.add_argument("--only", choices=("generator", "judge"), help="train one of the two; default: both")
    parser.add_argument("--evaluate", action="store_true", help="measure the folders that are there, train nothing")
    parser.add_argument("--guidance", type=float, help="guidance of the evaluation; default: chosen by the reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: torch's choice")
    parser.add_argument("--work", type=Path, default=Path(".train"), help="data, checkpoints and logs; resumes there")
    parser.add_argument("--into", type=Path, default=SHAPES.parent, help="receives the folders shapes and judge")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments without the program's name, None for those of the process.

    Returns:
        The exit code.
    """
    given = _parser().parse_args(arguments)
    torch.set_flush_denormal(True)
    if given.threads:
        torch.set_num_threads(given.threads)
    setup = Setup(work=given.work, into=given.into, seed=given.seed, device=torch.device(given.device))
    try:
        if not given.evaluate:
            if given.only != "judge":
                train_denoiser(setup, DENOISER_PLANS, train_vae(setup, VAE_PLAN, _tell), _tell)
            if given.only != "generator":
                train_judge(setup, JUDGE_PLAN, _tell)
        if given.evaluate or given.only is None:
            figures = evaluate(setup.into, setup.work, given.guidance, _tell)
            write_report(setup.into, setup.work, figures)
    except ExporterError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues from the last checkpoint\n")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
