r"""Public names, which are imported when they are asked for."""

import subprocess
import sys

import pytest

import pyg_attnpool


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_every_public_name_is_there_and_listed():
    for name in pyg_attnpool.__all__:
        assert name in dir(pyg_attnpool)
        value = getattr(pyg_attnpool, name)
        if isinstance(value, type):
            assert value.__name__ == name and value.__module__.startswith("pyg_attnpool.")
    assert pyg_attnpool.nn.AttentionPool is pyg_attnpool.AttentionPool
    assert pyg_attnpool.models.MorphableModel is pyg_attnpool.MorphableModel


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'AttentionPolo'"):
        _ = pyg_attnpool.AttentionPolo
    with pytest.raises(ImportError, match="AttentionPolo"):
        from pyg_attnpool import AttentionPolo  # noqa: F401


def test_a_star_brings_every_name_in_a_fresh_process():
    done = run(
        "import sys\n"
        "import pyg_attnpool\n"
        "assert 'torch' not in sys.modules\n"
        "from pyg_attnpool import *\n"
        "assert set(pyg_attnpool.__all__) <= set(globals())\n"
    )
    assert done.returncode == 0, done.stderr
