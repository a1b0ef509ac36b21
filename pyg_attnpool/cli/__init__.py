r"""The command line :obj:`pyg-attnpool` (extra :obj:`cli`): from a folder of registered meshes to a
morphable model, and what one does with it. Every command imports what it needs when it runs, so
that help and wrong arguments need no torch."""

import os
import sys
import warnings
from collections.abc import Sequence

# Threads that spin while they wait slow a busy machine ten times. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main(arguments: Sequence[str] | None = None) -> int:
    r"""Runs a command; see :func:`pyg_attnpool.cli.app.main`."""
    from pyg_attnpool.cli import app

    return app.main(arguments)


def entry() -> None:
    r"""The process's own entry point."""
    # A warning is a line for whoever runs a command, not a place in a program.
    warnings.formatwarning = lambda message, *_, **__: f"pyg-attnpool: {message}\n"
    try:
        sys.exit(main())
    except ImportError as e:  # of the library of the command line itself
        print(f"pyg-attnpool: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # while that is imported
        sys.exit(130)
