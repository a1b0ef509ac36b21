r"""The examples of the docstrings run, and say what they say."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest
import torch

import pyg_attnpool

MODULES = [
    module.name
    for module in pkgutil.walk_packages(pyg_attnpool.__path__, "pyg_attnpool.")
    if not module.name.startswith("pyg_attnpool.ops._")
]
# What a reader of the documentation has imported.
NAMES = {"torch": torch, "np": np} | {
    name: getattr(pyg_attnpool, name) for name in pyg_attnpool.__all__
}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        assert "install it with" in str(e)  # an extra that is not here
        return
    torch.manual_seed(0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, extraglobs=NAMES, optionflags=flags)
    assert result.failed == 0


def test_the_public_objects_have_one():
    for owner in (pyg_attnpool.nn, pyg_attnpool.models):
        for name in owner.__all__:
            assert getattr(owner, name).__doc__, name
    for name in ("AttentionPool", "AttentionUnpool", "Mapping", "MappingPool", "MorphableModel"):
        assert ">>>" in getattr(pyg_attnpool, name).__doc__, name
