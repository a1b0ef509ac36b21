from pyg_attnpool.cli import entry

entry()
