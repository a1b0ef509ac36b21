r"""The examples of the docstrings run, and say what they say."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest
import torch

import pyg_attnpool
from pyg_attnpool import MeshHierarchy, MorphableModel
from tests.mesh.meshes import icosphere

MODULES = [
    module.name
    for module in pkgutil.walk_packages(pyg_attnpool.__path__, "pyg_attnpool.")
    if not module.name.startswith("pyg_attnpool.ops._")
]
ROOMS = ("nn", "models", "mesh", "datasets", "training", "fitting", "visualize")
FILES = ("export", "latent", "metrics")
# Shown by the examples of the classes that they belong to.
TOLD_ELSEWHERE = {"encode_all", "evaluating", "quiet_lightning"}


@pytest.fixture(scope="session")
def names():
    r"""What a reader of the documentation has: the names of the package, a template, its hierarchy,
    registered meshes and a model of them."""
    template = icosphere(3)
    hierarchy = MeshHierarchy.from_template(template, factors=[4, 4])
    stretch = np.random.default_rng(0).uniform(0.09, 0.11, size=(24, 1, 3))
    meshes = torch.from_numpy(stretch * template[0]).float()
    model = MorphableModel.pca(template, 3).fit(meshes)
    of_package = {name: getattr(pyg_attnpool, name) for name in pyg_attnpool.__all__}
    return of_package | dict(
        torch=torch, np=np, template=template, hierarchy=hierarchy, meshes=meshes, model=model
    )


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        assert "install it with" in str(e)  # an extra that is not here
        return
    torch.manual_seed(0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, extraglobs=names, optionflags=flags)
    assert result.failed == 0


@pytest.mark.parametrize("room", [*ROOMS, *FILES])
def test_every_public_object_has_one(room):
    module = importlib.import_module(f"pyg_attnpool.{room}")
    of_file = [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    for name in getattr(module, "__all__", of_file):
        value = getattr(module, name)
        if callable(value) and name not in TOLD_ELSEWHERE:
            assert ">>>" in (value.__doc__ or ""), name
