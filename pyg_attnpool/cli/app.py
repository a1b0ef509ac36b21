from __future__ import annotations

import os
import sys
from collections.abc import Sequence

try:
    import tyro
except ImportError as e:
    raise ImportError(
        "The command line requires 'tyro': install it with `pip install \"pyg_attnpool[cli]\"`"
    ) from e

from pyg_attnpool.cli import look, model, shapes

COMMANDS = (
    model.train,
    model.evaluate,
    model.info,
    model.export,
    look.view,
    look.report,
    shapes.sample,
    shapes.interpolate,
    shapes.transfer,
    shapes.fit,
    shapes.edit,
    shapes.repair,
)
DESCRIPTION = """Morphable models of registered meshes: train one, look at it, move through it, fit
it to scans, send it. From a folder of scans to a page with sliders:

  pyg-attnpool train scans/ -o faces/ --unit mm
  pyg-attnpool evaluate faces/ unseen/
  pyg-attnpool view faces/
"""
# What goes on where it was cut off.
RESUMED = {"train", "fit"}


def main(arguments: Sequence[str] | None = None) -> int:
    r"""Runs a command.

    Args:
        arguments (list, optional): By default those of the process. (default: :obj:`None`)

    Returns:
        The exit code: 0, 1 after a mistake of the caller, which is one line, 130 after Ctrl-C.
        Wrong arguments end the process with 2.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    app = tyro.extras.SubcommandApp()
    for command in COMMANDS:
        app.command(command)
    try:
        code = app.cli(
            prog="pyg-attnpool",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        sys.stdout.flush()  # here, where a closed pipe is told from a mistake
        return code or 0
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` has. Nor may Python's end flush it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, TypeError, ValueError) as e:
        return _said(str(e), 1)
    except KeyboardInterrupt:
        how = "with --resume goes on" if {*arguments[:1]} & RESUMED else "begins again"
        return _said(f"stopped; every file is whole. The same command {how}.", 130)


def _said(line: str, code: int) -> int:
    print(f"pyg-attnpool: {line}", file=sys.stderr)
    return code
