from contextlib import nullcontext

import pytest

from pyg_attnpool.datasets.anny import bodies, model


def once(function):
    results = {}

    def call(*args, **kwargs):
        key = repr((args, kwargs))
        if key not in results:
            results[key] = function(*args, **kwargs)
        return results[key]

    return call


@pytest.fixture(scope="session")
def loaded_once(tmp_path_factory):
    # Reading Anny's files takes ten seconds; the data sets made in tests read them once.
    load, cache = model.load_anny, tmp_path_factory.mktemp("anny")

    @once
    def load_once(**options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.tempfile, "TemporaryDirectory", lambda **_: nullcontext(cache))
            return load(cache, "", **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load_anny", lambda folder, name, **options: load_once(**options))
        patch.setattr(bodies, "decimate", once(bodies.decimate))
        yield
