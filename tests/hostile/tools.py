r"""Tools of PyTorch over layers and models, against a dense twin: the matrix of
tests/nn/test_tooling.py, one pair a case."""

import warnings
from itertools import product
from pathlib import Path

import torch
from torch.testing import assert_close

from tests.nn.test_tooling import LAYERS, TOOLS, Dense, features, of_flop_counter, of_trace

ALL = {**TOOLS, "trace": of_trace, "FLOP counter": of_flop_counter}
PAIRS = list(product(LAYERS, ALL))


def name(number: int) -> str:
    return " under ".join(PAIRS[number])


def case(number: int, folder: Path) -> None:
    layer_name, tool = PAIRS[number]
    torch.manual_seed(0)
    layer = LAYERS[layer_name]().double()
    twin, x = Dense(layer), features(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracers, and of what runs slowly
        wanted = twin(torch.cat([x, -x])) if tool == "trace" else None
        if tool == "FLOP counter":
            wanted = twin(x)
        found = ALL[tool](layer, x)
        assert_close(found, ALL[tool](twin, x) if wanted is None else wanted, rtol=1e-6, atol=1e-8)
