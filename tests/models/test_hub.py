import os
import shutil
import subprocess
import sys

import pytest
import torch

from pyg_attnpool import MorphableModel
from tests.mesh.meshes import icosphere
from tests.models.hub_server import hub

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vertices, faces = icosphere(1)
    x = torch.from_numpy(vertices).float() + 0.1 * torch.randn(20, len(vertices), 3)
    return MorphableModel.pca((vertices, faces), 3).fit(x)


@pytest.fixture
def server():
    with hub() as server:
        yield server


def run(code, tmp_path, url):
    r"""Code in a process whose Hub is another one, as its client reads that when imported."""
    env = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_none",
    }
    code = f"from pyg_attnpool import MorphableModel\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )


CLOSED = "http://127.0.0.1:9"  # where nobody answers
LOAD = "MorphableModel.from_pretrained('anna/faces').save('loaded')\n"
PUSH = "print(MorphableModel.load('model').push_to_hub('anna/faces'))\n"


def test_a_folder_is_a_folder(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = MorphableModel.from_pretrained(tmp_path / "model")
    assert torch.equal(
        loaded.decode(loaded.latent_mean[None]), model.decode(model.latent_mean[None])
    )


def test_what_is_pushed_is_loaded_and_stays_without_a_connection(model, server, tmp_path):
    model.save(tmp_path / "model")
    pushed = run(PUSH + LOAD, tmp_path, server.url)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.split()[-1] == server.commit
    files = server.repositories["anna/faces"]
    assert {"config.json", "model.safetensors", "README.md"} <= set(files)
    # The card of the Hub: what it is, and how it is loaded from there.
    card = files["README.md"].decode()
    assert "library_name: pyg_attnpool" in card and 'from_pretrained("anna/faces")' in card

    loaded = MorphableModel.load(tmp_path / "loaded")
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), model.buffers(), strict=True))

    # The copy in the cache serves where nobody answers.
    shutil.rmtree(tmp_path / "loaded")
    done = run(LOAD, tmp_path, CLOSED)
    assert done.returncode == 0, done.stderr
    assert MorphableModel.load(tmp_path / "loaded").num_vertices == model.num_vertices


def errors(calls, tmp_path, url):
    r"""What calls raise, in one process."""
    code = "".join(
        f"try: {call.strip()}\nexcept Exception as e: print(f'{{type(e).__name__}}: {{e}}')\n"
        for call in calls
    )
    done = run(code, tmp_path, url)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_what_goes_wrong_is_one_line(model, server, tmp_path):
    server.repositories["anna/bodies"] = {"README.md": b"nothing yet"}
    bodies = "MorphableModel.from_pretrained('anna/bodies'"
    found = errors([LOAD, f"{bodies}, revision='v2')", f"{bodies})"], tmp_path, server.url)
    for line, expected in zip(
        found,
        (
            "ValueError: Expected a repository anna/faces on the Hub (got none",
            "ValueError: Expected another revision of anna/bodies",
            "FileNotFoundError: Expected a morphable model in",
        ),
        strict=True,
    ):
        assert line.startswith(expected)


@pytest.mark.slow
def test_without_a_connection_the_error_says_so(model, tmp_path):
    model.save(tmp_path / "model")
    load, push = errors([LOAD, PUSH], tmp_path, CLOSED)
    assert load.startswith("ConnectionError: Expected anna/faces from the Hub (got no connection")
    assert push.startswith("ConnectionError: Expected an answer of the Hub for anna/faces")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "", "../x y"])
def test_other_names_are_refused(model, name):
    with pytest.raises(ValueError, match="Expected .*the folder of a model, or 'owner/name'"):
        MorphableModel.from_pretrained(name)
    with pytest.raises(ValueError, match="owner/name"):
        model.push_to_hub(name)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pyg_attnpool\[hub\]"):
        MorphableModel.from_pretrained("anna/faces")
