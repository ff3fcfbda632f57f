"""The command ``flexmoe report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexmoe.cli.common import Base, Device, quiet, say

EXAMPLES = """\
[bold]Examples[/bold]

  # report/report.html and PNGs

  flexmoe report families/tiny -o report

  # one page, with text of every size

  flexmoe report families/tiny -o tiny.html --samples 4
"""
SHOWN = 5  # budgets whose text stands side by side


def report(
    family: Annotated[Path, typer.Argument(help="family folder, or a plan alone")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to make, or FILE.html")],
    samples: Annotated[
        int | None, typer.Option(help="beginnings of held-out text to continue at several budgets")
    ] = None,
    base: Base = None,
    device: Device = "auto",
) -> None:
    """One HTML page of what pruning costs, from the measured curve: flexmoe eval FAMILY --save."""
    from flexmoe.errors import FlexmoeError
    from flexmoe.evidence import FILE_NAME, Evidence
    from flexmoe.files import refuse_existing
    from flexmoe.headers import resolve
    from flexmoe.plan import read_manifest
    from flexmoe.progress import bar
    from flexmoe.reports.page import build_page, measured_curve
    from flexmoe.reports.samples import make_samples

    quiet()
    refuse_existing(out)
    manifest = read_manifest(family)
    if manifest.ranked and base is not None:
        raise FlexmoeError(f"'{family}' is a family with weights of its own: leave --base out")
    if device != "auto" and samples is None:
        raise FlexmoeError("--device has no effect without --samples: nothing is computed")
    curve = measured_curve(family, bar)
    weights = family if manifest.ranked else None
    if not manifest.ranked and (base is not None or samples is not None):
        weights = resolve(base or manifest.recipe.base_model)
    made = []
    if samples is not None and weights is not None:
        budgets = [point.pruned for point in curve.budgets]
        step = -(-len(budgets) // SHOWN)
        made = make_samples(
            family, weights, curve.data, budgets[::step], samples,
            base=base, device=device, track=bar,
        )  # fmt: skip
    seen = None
    if (family / FILE_NAME).is_file():
        seen = Evidence.load(family, manifest.recipe.data_sha256)
    page = build_page(family, curve, weights=weights, samples=made, evidence=seen)
    say("\n".join(map(str, page.write(out))))
