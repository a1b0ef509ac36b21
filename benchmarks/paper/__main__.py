r"""The command line: :obj:`python -m benchmarks.paper table1 --scale smoke`."""

import sys
from functools import partial

import tyro

from benchmarks.paper import curves, error_maps, mappings, receptive_fields, sharpening
from benchmarks.paper.pictures import PictureOptions
from benchmarks.paper.registry import EXPERIMENTS
from benchmarks.paper.sweep import sweep

PICTURES = {
    picture.name: (picture.about, PictureOptions, picture.main)
    for picture in (*error_maps.PICTURES, *mappings.PICTURES)
}
PICTURES["figure6"] = (receptive_fields.ABOUT, PictureOptions, receptive_fields.main)
PICTURES = {name: PICTURES[name] for name in sorted(PICTURES, key=lambda name: int(name[6:]))}
COMMANDS = {e.name: (e.about, e.options, partial(sweep, e)) for e in EXPERIMENTS} | PICTURES
COMMANDS["curves"] = (curves.ABOUT, curves.CurveOptions, curves.main)
COMMANDS["sharpening"] = (sharpening.ABOUT, sharpening.SharpeningOptions, sharpening.main)

PROGRAM = "python -m benchmarks.paper"
EXAMPLES = f"""\
    {PROGRAM} table1                            # faces made here, three seeds
    {PROGRAM} table1 --scale smoke --seeds 0    # whether it works, in seconds
    {PROGRAM} table1 --data coma --scale full   # your copy of COMA, as published
    {PROGRAM} table1 --data my/scans --unit mm  # your own registered meshes
    {PROGRAM} figure3 --jobs 2 --resume         # two at a time; goes on
    {PROGRAM} figure4 --data faces bodies       # a picture for each
"""


def overview() -> str:
    r"""All tables and figures, a line each."""
    lines = [f"    {name:13}{about}" for name, (about, *_) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} NAME [OPTIONS]",
            "",
            "Trains what a table or figure compares, and writes it, the paper's numbers beside.",
            "",
            *lines,
            "",
            f"{PROGRAM} NAME --help lists the options.",
            "",
            EXAMPLES,
        ]
    )


def main(*args: str):
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return
    name, *rest = args
    if name not in COMMANDS:
        sys.exit(f"{overview()}\nExpected one of these names (got {name!r})")
    about, options, run = COMMANDS[name]
    description = f"{name}: {about}."
    run(tyro.cli(options, prog=f"{PROGRAM} {name}", description=description, args=rest))


if __name__ == "__main__":
    main(*sys.argv[1:])
