r"""Those tests of torch-geometric-pool that it runs on every pooler, on the pooler of this package:

git clone --branch v1.0.2 https://github.com/tgp-team/torch-geometric-pool
python -m tests.integrations.their_tests torch-geometric-pool
"""

import os
import sys
from pathlib import Path

import pytest
from tgp.poolers import pooler_map

from pyg_attnpool import AttentionPool, AttentionUnpool
from pyg_attnpool.integrations.tgp import MappingPooling

# The graphs of these tests have six vertices, which the pooler has to know.
NUM_NODES, NUM_POOLED = 6, 3
TESTS = ("test_poolers.py", "test_spt_adj.py")


class Attention(MappingPooling):
    r"""The pooler as `get_pooler("attention")` makes it."""

    def __init__(self) -> None:
        kwargs = {"channels": 4, "k": 2}
        super().__init__(
            AttentionPool.published(NUM_NODES, NUM_POOLED, **kwargs),
            AttentionUnpool.published(NUM_POOLED, NUM_NODES, **kwargs),
        )


def main(checkout: str) -> int:
    r"""Runs the tests of a checkout, whose own settings of pytest are left out."""
    pooler_map["attention"] = Attention
    files = [str(Path(checkout) / "tests" / name) for name in TESTS]
    chosen = ["-k", "attention", "-p", "no:cacheprovider", "-v"]
    return pytest.main([*files, *chosen, "-c", os.devnull, "--rootdir", checkout])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
