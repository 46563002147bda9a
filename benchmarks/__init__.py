"""Figures against peers. Each module's docstring says how to run it; `make peers` makes the environment that the peers run in."""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def add_corpora(parser: argparse.ArgumentParser) -> None:
    """`--corpora FOLDER`, needed unless a folder of them stands beside this checkout."""
    beside = ROOT.parent / "shared" / "corpora"
    told = f"default: {beside.relative_to(ROOT.parent)} beside this checkout" if beside.is_dir() else "see above"
    parser.add_argument("--corpora", type=Path, default=beside if beside.is_dir() else None, required=not beside.is_dir(), help=told)
