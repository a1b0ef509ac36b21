r"""Training by several processes at once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytorch_lightning")

from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.training import data, load_checkpoint
from tests.mesh.meshes import icosphere
from tests.training.test_fit import meshes, model
from tests.training.test_streaming import mapped

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, sys
from pathlib import Path
import torch
import pyg_attnpool.training.run as run
from tests.training.test_processes import train

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
written, save = [], run.save_checkpoint

def record(checkpoint, path, *args):
    written.append(path.name)
    save(checkpoint, path, *args)

run.save_checkpoint = record
several = dict(batch_size=4, devices=2, strategy="ddp")
for name, kwargs in {
    "whole": dict(epochs=3, output=folder / "whole"),
    "parts": dict(epochs=1, output=folder / "parts"),
    "longer": dict(epochs=3, output=folder / "parts", resume=True),
    "more": dict(epochs=3, output=folder / "alone", resume=True),
    "mapped": dict(epochs=1, stored=folder),
}.items():
    trained = train(**several, **kwargs)
    torch.save(trained.state_dict(), folder / f"{name}{rank}.pt")
    print(rank, name, trained.summary["validation error (mm)"], *written, flush=True)
    written.clear()
"""


def train(stored=None, **kwargs):
    hierarchy = MeshHierarchy.from_template(icosphere(1), factors=[3, 2])
    x, val = meshes(40), meshes(9, 1)
    if stored is not None:  # one mesh to validate, which the second process has no part of
        folder = Path(stored) / f"data{os.environ.get('RANK')}"
        folder.mkdir()
        x, val = mapped(folder, x.numpy()), mapped(folder, val[:1].numpy())
    options = dict(optimizer="sgd", lr=0.05, accelerator="cpu", enable_progress_bar=False)
    return model(hierarchy).fit(x, val, **options, **kwargs)


@pytest.mark.slow
def test_two_processes_train_as_one_at_the_same_global_batch(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    train(batch_size=8, epochs=1, output=tmp_path / "alone")  # which two processes go on with
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As torchrun starts them.
    common = dict(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
    )
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "run.py", tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    lines = [
        {line.split()[1]: line.split()[2:] for line in text.splitlines() if line[:2] == f"{rank} "}
        for rank, text in enumerate(printed)
    ]
    for name, kwargs in {
        "whole": dict(epochs=3),
        "longer": dict(epochs=3),
        "more": dict(epochs=3),
        "mapped": dict(epochs=1, stored=tmp_path),
    }.items():
        one = train(batch_size=8, **kwargs)
        for rank in (0, 1):
            state = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            for key, value in one.state_dict().items():
                torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6)
            error = float(lines[rank][name][0])
            assert error == pytest.approx(one.summary["validation error (mm)"], rel=1e-3)
    # The first process alone writes.
    assert lines[0]["whole"][1:] == ["best.ckpt", "last.ckpt"] * 3
    assert [written for _, *written in lines[1].values()] == [[]] * 5
    assert load_checkpoint(tmp_path / "whole" / "last.ckpt")["settings"]["processes"] == 2
    assert len(list((tmp_path / "whole" / "log").iterdir())) == 1

    # One process goes on with what two began, at the same global batch alone.
    again = dict(epochs=4, output=tmp_path / "whole", resume=True)
    with pytest.raises(ValueError, match=r"run with batch_size . processes=4 .got 8"):
        train(batch_size=4, **again)
    one, found = train(batch_size=8, epochs=4), train(batch_size=8, **again)
    assert found.summary["steps"] == one.summary["steps"] == 20
    for key, value in one.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=0, atol=1e-6)


def test_each_mesh_is_validated_once_by_all_processes_together():
    x = torch.arange(67.0).view(-1, 1, 1).expand(-1, 42, 3)
    for num in (1, 2, 7, 64, 65, 67):
        for world_size in (1, 2, 3, 8):
            parts = [
                data._Batches(x[:num], 4, None, rank, world_size) for rank in range(world_size)
            ]
            batches = [list(part) for part in parts]
            # As many steps for each, or the others would wait forever.
            assert {len(part) for part in batches} == {len(parts[0])}
            read = torch.cat([torch.cat(part) for part in batches])
            assert sorted(read.tolist()) == list(range(num))
            # Together they are the batches of one process.
            for step, whole in enumerate(torch.arange(num).split(4 * world_size)):
                assert torch.equal(torch.cat([part[step] for part in batches]), whole)
