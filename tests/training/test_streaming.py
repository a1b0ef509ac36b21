import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pl = pytest.importorskip("pytorch_lightning")

from pyg_attnpool.datasets import MeshDataset  # noqa: E402
from pyg_attnpool.mesh import MeshHierarchy  # noqa: E402
from pyg_attnpool.models import MorphableModel  # noqa: E402
from pyg_attnpool.training import (  # noqa: E402
    MeshData,
    MeshTraining,
)
from pyg_attnpool.training import data as training  # noqa: E402
from pyg_attnpool.training.statistics import statistics  # noqa: E402
from tests.mesh.meshes import icosphere  # noqa: E402


def spheres(num, seed=0):
    # In metres, stretched along one axis and swollen.
    rng = np.random.default_rng(seed)
    stretch = 1 + 0.2 * rng.random((num, 1, 1))
    swollen = 1 + 0.1 * rng.random((num, 1, 1))
    return (icosphere(1)[0] / 10 * stretch ** [1.0, 0.5, 0.2] * swollen).astype(np.float32)


def mapped(folder, vertices):
    path = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(path, vertices)
    vertices = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    return MeshDataset(vertices, icosphere(1))


@pytest.mark.parametrize("num", [1, 2, 63, 64, 65, 200])
def test_statistics_in_one_pass_are_those_of_two(tmp_path, num):
    # Far from the origin: single precision would lose them, and so would sums of squares.
    rng = np.random.default_rng(num)
    x = (1e3 + rng.normal(0, 1e-3, (num, 42, 3))).astype(np.float32)
    mean, std = x.astype(np.float64).mean(axis=0), x.astype(np.float64).std(axis=0)
    for meshes in (torch.from_numpy(x), mapped(tmp_path, x)):
        got_mean, got_std = statistics("meshes", meshes)
        np.testing.assert_allclose(got_mean.numpy(), mean, rtol=1e-7)
        moving = std > 1e-6 * np.abs(x).max(axis=0)  # others are divided by one
        expected = np.where(moving, std, 1)
        np.testing.assert_allclose(got_std.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_statistics_of_a_known_distribution(tmp_path):
    # Of 0, 1, ..., n - 1 the mean is (n - 1) / 2 and the variance (n^2 - 1) / 12.
    n = 301
    x = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None], (n, 42, 3))
    mean, std = statistics("meshes", mapped(tmp_path, x))
    torch.testing.assert_close(mean, torch.full((42, 3), (n - 1) / 2))
    torch.testing.assert_close(std, torch.full((42, 3), ((n**2 - 1) / 12) ** 0.5))


def loader(dataset, batch_size=7, seed=0):
    return MeshData(dataset, dataset, batch_size)._loader(dataset, batch_size, seed)


def test_an_epoch_reads_every_mesh_once_in_new_order(tmp_path):
    vertices = np.arange(1000, dtype=np.float32)[:, None, None] + np.zeros((1, 42, 3), np.float32)
    dataset = mapped(tmp_path, vertices)[torch.arange(990, 9, -1)]
    epochs = []
    for epoch in (0, 1):
        batches = loader(dataset)
        batches.sampler.set_epoch(epoch)
        read = list(batches)
        assert len(read) == len(batches) and {len(batch) for batch in read[:-1]} == {7}
        epochs.append(torch.cat(read)[:, 0, 0])
        assert epochs[-1].sort().values.tolist() == list(range(10, 991))
    assert not torch.equal(*epochs)
    again = torch.cat(list(loader(dataset)))[:, 0, 0]
    assert torch.equal(again, epochs[0])
    assert not torch.equal(torch.cat(list(loader(dataset, seed=1)))[:, 0, 0], again)
    # Validation goes through them in order, from the last to the first of these.
    assert torch.cat(list(loader(dataset, seed=None)))[:, 0, 0].tolist() == list(range(990, 9, -1))


def test_neighbours_are_read_about_together_and_mixed(monkeypatch):
    monkeypatch.setattr(training, "BLOCK", 8)
    monkeypatch.setattr(training, "MIXED", 5)
    order = training._in_blocks(403, torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(403))
    parts = order.split(40)
    whole = 0
    for part in parts[:-1]:
        sizes = torch.bincount(part // 8, minlength=51)
        # At most two blocks lie across the edge of a part, where the short one has moved it.
        assert (sizes > 0).sum() <= 6
        whole += int((sizes == 8).sum())
        assert (part.diff().abs() == 1).float().mean() < 0.4
    assert whole >= 40
    # Blocks come from everywhere, not in order.
    first = torch.tensor([float(part.float().mean()) for part in parts])
    assert 0 < (first.diff() > 0).sum() < len(parts) - 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("in_memory", [False, True])
def test_processes_read_disjoint_parts(tmp_path, world_size, in_memory):
    x = torch.from_numpy(spheres(101)) if in_memory else mapped(tmp_path, spheres(101))
    orders = []
    for epoch in (0, 1):
        parts = []
        for rank in range(world_size):
            batches = training._Batches(x, 4, 0, rank, world_size)
            batches.set_epoch(epoch)
            parts.append(torch.cat(list(batches)))
            assert len(batches) == len(list(batches))
        # As many steps for each, or the others would wait forever.
        assert len({len(part) for part in parts}) == 1
        read = torch.cat(parts)
        assert set(read.tolist()) == set(range(101))
        assert len(read) - 101 < world_size  # read twice
        orders.append(read)
    assert not torch.equal(*orders)


def model(seed=0):
    hierarchy = MeshHierarchy.from_template(icosphere(1), factors=[3, 2])
    torch.manual_seed(seed)
    sizes = dict(channels=(4, 4), decoder_channels=(4, 4, 4))
    return MorphableModel.coma(hierarchy, 2, "qem", **sizes)


def train(folder, data, output, **kwargs):
    arguments = dict(output=folder / output, batch_size=8, accelerator="cpu", epochs=4) | kwargs
    return model().fit(*data, **arguments)


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_training_on_mapped_meshes_lowers_the_error_and_resumes(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    dataset = mapped(tmp_path / "data", spheres(200))
    split = dataset.split("independent")
    data = dataset[split.train], dataset[split.val]
    test = dataset[split.test]
    whole = train(tmp_path, data, "whole")
    untrained = model()
    untrained.set_statistics(whole.mean, whole.std)
    assert whole.evaluate(test)["mean"] < 0.7 * untrained.evaluate(test)["mean"]

    def kill(self):
        if self.current_epoch == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MeshTraining, "on_train_epoch_start", kill)
        train(tmp_path, data, "killed")
    resumed = train(tmp_path, data, "killed", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_mapped_meshes_are_evaluated_as_those_in_memory(tmp_path):
    x = spheres(150)
    pca = MorphableModel.pca(icosphere(1), 2).fit(x[:100], x[100:])
    assert pca.evaluate(mapped(tmp_path, x)) == pca.evaluate(torch.from_numpy(x))


def test_bad_mapped_meshes(tmp_path):
    x = spheres(100)
    x[73, 5, 1] = np.nan
    broken, whole = mapped(tmp_path, x), mapped(tmp_path, spheres(20))
    with pytest.raises(ValueError, match=r"finite training meshes .got NaN or infinity in mesh 73"):
        train(tmp_path, (broken, whole), "run", epochs=1)
    with pytest.raises(ValueError, match=r"finite training meshes .* in mesh 3"):
        train(tmp_path, (broken[70:], whole), "run", epochs=1)
    with pytest.raises(ValueError, match="finite validation meshes .*in mesh 73"):
        train(tmp_path, (whole, broken), "run", epochs=1)
    other = MeshDataset(torch.zeros(9, 12, 3), icosphere(0))
    with pytest.raises(ValueError, match=r"training meshes of 42 vertices .*got 12"):
        train(tmp_path, (other, whole), "run", epochs=1)
    with pytest.raises(ValueError, match=r"validation meshes of shape .*got \[0, 42, 3\]"):
        train(tmp_path, (whole, whole[:0]), "run", epochs=1)


@pytest.mark.slow
def test_memory_of_an_epoch_does_not_hold_the_meshes(tmp_path):
    # 115 MiB of them, of which a block or two may be in memory at a time.
    command = [sys.executable, "-m", "benchmarks.speed.streaming", "--meshes", "6250"]
    command += ["--output", str(tmp_path)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "Statistics and an epoch" in (tmp_path / "streaming.md").read_text()
    anonymous = {
        line[:24].strip(): int(re.search(r"anonymous\s+([\d,]+)", line)[1].replace(",", ""))
        for line in run.stdout.splitlines()
        if " s   anonymous" in line
    }
    assert "6,250 meshes of 1,609 vertices: 115 MiB" in run.stdout
    before = anonymous["Imports and model"]
    assert anonymous["Writing and verifying"] < before + 40
    # Optimiser, activations and Lightning take what they take with few meshes too.
    assert anonymous["Statistics and an epoch"] < before + 110


@pytest.mark.slow
def test_two_processes_of_lightning_read_disjoint_parts(tmp_path):
    code = """
import sys
from pathlib import Path
import torch, pytorch_lightning as pl
from pyg_attnpool.training import MeshData
from tests.training.test_streaming import mapped, spheres

class Record(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
    def training_step(self, x, step):
        self.seen.append(x[:, 0, 0].detach().clone())
        return self.weight.sum() + 0 * x.sum()
    def validation_step(self, x, step):
        pass
    def on_train_epoch_end(self):
        name = f"{self.global_rank}_{self.current_epoch}.pt"
        torch.save(torch.cat(self.seen), Path(sys.argv[1]) / name)
        self.seen = []
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    data = Path(sys.argv[1]) / f"data{pl.utilities.rank_zero_only.rank}"
    data.mkdir()
    dataset = mapped(data, spheres(100))
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False,
                         num_sanity_val_steps=0)
    trainer.fit(Record(), MeshData(dataset, dataset, batch_size=8))
"""
    (tmp_path / "run.py").write_text(code)
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, tmp_path / "run.py", tmp_path],
        check=True,
        capture_output=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=300,
    )
    expected = sorted(spheres(100)[:, 0, 0].tolist())
    epochs = []
    for epoch in (0, 1):
        parts = [torch.load(tmp_path / f"{r}_{epoch}.pt", weights_only=True) for r in (0, 1)]
        assert [len(part) for part in parts] == [50, 50]
        epochs.append(torch.cat(parts))
        assert sorted(epochs[-1].tolist()) == expected
    assert not torch.equal(*epochs)
