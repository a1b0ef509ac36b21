r"""The command line :obj:`pyg-attnpool` (extra :obj:`cli`): from a folder of registered meshes to a
morphable model, and what one does with it. Every command imports what it needs when it runs, so
that help and wrong arguments need no torch."""

from pyg_attnpool.cli.app import entry, main

__all__ = ["entry", "main"]
