r"""The examples of the docstrings run, and say what they say."""

import ast
import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

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


class Finder(doctest.DocTestFinder):
    def _from_module(self, module, object):
        # What `torch.no_grad` wraps has the globals of torch, and would not be run.
        return super()._from_module(module, inspect.unwrap(object))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        if "install it with" not in str(e):
            raise
        pytest.skip(str(e))  # an extra that is not here
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    tests = Finder(exclude_empty=True).find(module, extraglobs=names)
    for test in tests:
        runner.run(test)
    assert runner.failures == 0
    # Every example of the file, by its text, was among them.
    documented = ast.FunctionDef, ast.ClassDef, ast.Module
    nodes = ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    assert sum(len(test.examples) > 0 for test in tests) == sum(">>> " in text for text in texts)


def public_names(room):
    module = importlib.import_module(f"pyg_attnpool.{room}")
    of_file = [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    return {name: getattr(module, name) for name in getattr(module, "__all__", of_file)}


def public_methods(cls):
    r"""Methods and properties by name, with the docstring that they or a base of the package have.
    What PyG or Lightning say of a method of theirs does not tell what ours does."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("pyg_attnpool")]
    for name in sorted({name for base in bases for name in vars(base) if name[0] != "_"}):
        found = [inspect.getattr_static(base, name) for base in bases if name in vars(base)]
        found = [getattr(value, "fget", getattr(value, "__func__", value)) for value in found]
        if inspect.isfunction(found[0]):
            yield name, next((f.__doc__ for f in found if getattr(f, "__doc__", None)), None)


@pytest.mark.parametrize("room", [*ROOMS, *FILES])
def test_every_public_method_has_a_docstring(room):
    classes = [value for value in public_names(room).values() if inspect.isclass(value)]
    bare = [(c.__name__, name) for c in classes for name, doc in public_methods(c) if not doc]
    assert bare == []


def test_every_method_of_a_model_has_an_example():
    methods = {
        name: doc
        for name, doc in public_methods(MorphableModel)
        if name in vars(MorphableModel)
        and not isinstance(inspect.getattr_static(MorphableModel, name), property)
    }
    assert len(methods) > 20
    assert [name for name, doc in methods.items() if ">>> " not in doc] == []


@pytest.mark.parametrize("room", [*ROOMS, *FILES])
def test_every_public_object_has_one(room):
    for name, value in public_names(room).items():
        if callable(value) and name not in TOLD_ELSEWHERE:
            assert ">>>" in (value.__doc__ or ""), name
