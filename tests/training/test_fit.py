import csv
import ctypes
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

pl = pytest.importorskip("pytorch_lightning")

from pyg_attnpool.datasets import MeshDataset  # noqa: E402
from pyg_attnpool.mesh import MeshHierarchy  # noqa: E402
from pyg_attnpool.metrics import reconstruction_error  # noqa: E402
from pyg_attnpool.models import MorphableModel  # noqa: E402
from pyg_attnpool.training import (  # noqa: E402
    MeshData,
    MeshTraining,
    jitter,
    rigid_motion,
)
from tests.mesh.meshes import icosphere  # noqa: E402

SMALL = dict(channels=(4, 4), decoder_channels=(4, 4, 4))


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(icosphere(1), factors=[3, 2])


def meshes(num, seed=0):
    r"""Spheres in metres, stretched along one axis and swollen."""
    generator = torch.Generator().manual_seed(seed)
    template = torch.from_numpy(icosphere(1)[0]).float() / 10
    stretch = 1 + 0.2 * torch.rand(num, 1, 1, generator=generator)
    axis = torch.tensor([1.0, 0.5, 0.2])
    return template * stretch**axis * (1 + 0.1 * torch.rand(num, 1, 1, generator=generator))


def model(hierarchy, pool="attention", seed=0, **kwargs):
    torch.manual_seed(seed)
    if pool == "attention":
        kwargs |= dict(down_kwargs=dict(channels=5), up_kwargs=dict(channels=5, k=4))
    return MorphableModel.coma(hierarchy, 2, pool, **SMALL, **kwargs)


def run(hierarchy, output, pool="attention", **kwargs):
    data = dict(train=meshes(37), val=meshes(9, 1))
    kwargs = dict(**data, epochs=4, batch_size=8, accelerator="cpu", output=output) | kwargs
    return model(hierarchy, pool).fit(**kwargs)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("pool", ["qem", "attention"])
@pytest.mark.parametrize("optimizer", ["one_cycle", "sgd"])
def test_training_lowers_the_error(tmp_path, hierarchy, pool, optimizer):
    test = meshes(20, 2)
    untrained = model(hierarchy, pool)
    trained = run(hierarchy, tmp_path, pool, optimizer=optimizer, epochs=12)
    untrained.set_statistics(trained.mean, trained.std)
    assert trained.evaluate(test)["mean"] < 0.7 * untrained.evaluate(test)["mean"]
    # What came back is the best epoch by the validation error it logged.
    (log,) = tmp_path.glob("log/*/metrics.csv")
    header, *lines = [line.split(",") for line in log.read_text().splitlines()]
    logged = [float(line[header.index("val_mm")]) for line in lines if line[header.index("val_mm")]]
    assert len(logged) == 12
    error = trained.evaluate(meshes(9, 1))["mean"]
    assert error == pytest.approx(min(logged), rel=1e-4)


def test_the_validation_error_is_that_of_all_meshes(tmp_path, hierarchy):
    # Of batches of 64 the last one is short, and its meshes are unlike the others.
    val = torch.cat([meshes(64, 1), 1.5 * meshes(3, 2)])
    trained = run(hierarchy, tmp_path, val=val, epochs=1)
    error = trained.evaluate(val)["mean"]
    assert trained.summary["validation error (mm)"] == pytest.approx(error, rel=1e-3)


def test_a_network_of_encode_and_decode_alone_is_trained(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = torch.nn.Linear(126, 2), torch.nn.Linear(2, 126)

        def encode(self, x):
            return self.down(x.flatten(1))

        def decode(self, z):
            return self.up(z).view(-1, 42, 3)

    class Whole(Own):
        def forward(self, x):
            return self.decode(self.encode(x))

    def trained(network):
        torch.manual_seed(0)
        data = dict(train=meshes(37), val=meshes(9, 1), output=tmp_path / network.__name__)
        return MorphableModel(network(), icosphere(1)).fit(**data, epochs=4, accelerator="cpu")

    own = trained(Own)
    torch.manual_seed(0)
    assert not torch.equal(own.autoencoder.up.weight, Own().up.weight)
    assert equal(own, trained(Whole))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("optimizer", ["one_cycle", "sgd"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, hierarchy, monkeypatch, optimizer):
    whole = run(hierarchy, tmp_path / "whole", optimizer=optimizer)

    def kill(self):
        if self.current_epoch == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MeshTraining, "on_train_epoch_start", kill)
        run(hierarchy, tmp_path / "killed", optimizer=optimizer)
    steps = []
    monkeypatch.setattr(MeshTraining, "on_train_epoch_start", lambda m: steps.append(m.global_step))
    resumed = run(hierarchy, tmp_path / "killed", optimizer=optimizer, resume=True)
    assert steps == [10, 15]  # it did not start from the beginning
    assert equal(whole, resumed)
    last = [
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    # A run that is complete is not run again.
    again = run(hierarchy, tmp_path / "killed", optimizer=optimizer, resume=True)
    assert steps == [10, 15]
    assert equal(again, whole)


def test_same_seed_same_bits_other_seed_other_order(tmp_path, hierarchy):
    first, second, third = (
        run(hierarchy, tmp_path / str(i), epochs=2, seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    assert equal(first, second)
    assert not equal(first, third)


def test_standardisation_is_that_of_the_training_meshes(tmp_path, hierarchy):
    x = meshes(50)
    x[:, 3] = torch.tensor([0.3, -0.2, 100.0])  # a vertex that never moves
    with pytest.warns(UserWarning, match="look like millimetres"):  # 100 m away
        trained = model(hierarchy).fit(x, meshes(5), epochs=1, accelerator="cpu")
    z = trained.standardize(x)
    torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), atol=1e-4, rtol=0)
    still = x.std(0) < 1e-6  # that vertex, and coordinates that are zero in every sphere
    assert still[3].all() and not still.all()
    expected = (~still).float()
    torch.testing.assert_close(z.std(0, correction=0), expected, atol=1e-3, rtol=0)
    assert torch.isfinite(z).all() and z[:, 3].abs().max() < 1e-3


def test_latent_statistics_are_those_of_the_training_codes(hierarchy):
    trained = run(hierarchy, None, epochs=1)
    with torch.no_grad():
        codes = trained.encode(meshes(37)).double().numpy()
    np.testing.assert_allclose(trained.latent_mean, codes.mean(axis=0), rtol=1e-4, atol=1e-6)
    expected = np.cov(codes.T, bias=True)
    np.testing.assert_allclose(trained.latent_cov, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(trained.latent_std, codes.std(axis=0), rtol=1e-3, atol=1e-6)


def test_a_logger_of_the_user_gets_what_is_logged(tmp_path, hierarchy):
    logger = pl.loggers.CSVLogger(tmp_path / "mine", name="run", version=0)
    trained = run(hierarchy, tmp_path / "out", epochs=2, logger=logger)
    assert trained.summary["epochs"] == 2
    assert not (tmp_path / "out" / "log").exists()  # theirs alone
    with open(tmp_path / "mine" / "run" / "version_0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    validated = [float(row["val_mm"]) for row in rows if row["val_mm"]]
    assert len(validated) == 2
    assert min(validated) == pytest.approx(trained.summary["validation error (mm)"], rel=1e-3)


def test_without_validation_meshes_they_are_split_from_the_others(hierarchy):
    x = meshes(45)
    alone = model(hierarchy).fit(x, epochs=2, batch_size=8, accelerator="cpu")
    apart = model(hierarchy).fit(x[5:], x[:5], epochs=2, batch_size=8, accelerator="cpu")
    assert equal(alone, apart) and alone.summary["meshes"] == 40
    dataset = MeshDataset(x, icosphere(1))
    split = dataset.split()
    alone = model(hierarchy).fit(dataset, epochs=2, batch_size=8, accelerator="cpu")
    apart = model(hierarchy).fit(
        dataset[split.train], dataset[split.val], epochs=2, batch_size=8, accelerator="cpu"
    )
    assert equal(alone, apart)


def test_a_random_augmentation_resumes_to_the_same_bits(tmp_path, hierarchy, monkeypatch):
    turn, noise = rigid_motion(angle=5.0), jitter(1e-3)
    kwargs = dict(transform=lambda x: noise(turn(x)))
    torch.manual_seed(0)
    whole = run(hierarchy, tmp_path / "whole", **kwargs)
    plain = run(hierarchy, tmp_path / "plain")
    assert not equal(whole, plain)
    start = MeshTraining.on_train_epoch_start

    def kill(self):
        start(self)
        if self.current_epoch == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MeshTraining, "on_train_epoch_start", kill)
        torch.manual_seed(0)
        run(hierarchy, tmp_path / "killed", **kwargs)
    torch.manual_seed(123)
    assert equal(run(hierarchy, tmp_path / "killed", resume=True, **kwargs), whole)


def test_augmentation_depends_on_seed_and_epoch_alone(tmp_path, hierarchy):
    # Of any generator, whatever was drawn before, in one run or two.
    def drawn(output, *epochs, seed=0, **kwargs):
        seen = []

        def transform(x):
            seen.append((random.random(), np.random.rand(), torch.rand(1).item()))
            return x

        for number in epochs:
            torch.rand(number), np.random.rand(number), random.random()
            run(hierarchy, output, epochs=number, seed=seed, transform=transform, **kwargs)
        return seen

    whole = drawn(tmp_path / "whole", 2, optimizer="sgd")
    assert len(whole) == len(set(whole)) == 10
    assert drawn(tmp_path / "parts", 1, 2, optimizer="sgd", resume=True) == whole
    assert not set(drawn(tmp_path / "other", 1, seed=1)) & set(whole)


def test_a_training_leaves_the_global_generators_as_they_were(tmp_path, hierarchy):
    untrained = model(hierarchy)

    def draw(fit):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        if fit:
            untrained.fit(meshes(20), meshes(5), epochs=1, accelerator="cpu")
        return torch.rand(1).item(), np.random.rand(), random.random()

    assert draw(True) == draw(False)


def test_an_own_loss_and_optimizer_train(tmp_path, hierarchy):
    seen = []

    def loss(out, target):
        seen.append(target.std().item())
        return (out - target).square().mean()

    trained = run(
        hierarchy,
        tmp_path,
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        epochs=12,
        freeze=True,
    )
    assert len(seen) == 60 and 0.5 < seen[0] < 1.5  # standardised
    assert trained.evaluate(meshes(20, 2))["mean"] < 12
    assert not any("key" in name for name, _ in trained.named_parameters())


def test_more_epochs_follow_where_the_schedule_allows(tmp_path, hierarchy):
    whole = run(hierarchy, tmp_path / "whole", optimizer="sgd", epochs=4)
    run(hierarchy, tmp_path / "longer", optimizer="sgd", epochs=2)
    longer = run(hierarchy, tmp_path / "longer", optimizer="sgd", epochs=4, resume=True)
    assert equal(longer, whole)


def test_two_trainings_do_not_share_a_folder(tmp_path, hierarchy):
    class Second(pl.Callback):
        def on_train_start(self, trainer, module):
            with pytest.raises(ValueError, match="no training writes to"):
                run(hierarchy, tmp_path, epochs=1)

    run(hierarchy, tmp_path, epochs=1, callbacks=[Second()])
    run(hierarchy, tmp_path, epochs=1)  # afterwards it may
    assert (tmp_path / ".lock").read_bytes() == b""  # it stays: another may wait at it


def test_a_network_that_is_no_morphable_model_has_no_error(hierarchy):
    network = model(hierarchy).autoencoder
    with pytest.raises(TypeError, match=r"Expected a MorphableModel.*got MeshAutoencoder"):
        reconstruction_error(network, meshes(3))


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="needs the GNU C library",
)
def test_freed_memory_is_kept_until_the_next_training():
    script = """
from pathlib import Path
import torch
from pyg_attnpool.training import keep_freed_memory

def used():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) >> 10

keep_freed_memory()
before = used()
kept = [(torch.ones(1 << 18), torch.ones(64)) for _ in range(200)]  # 1 MiB, and what stays
kept = [small for _, small in kept]
print(before, used())
keep_freed_memory()
print(used())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, freed, trimmed = map(int, result.stdout.split())
    assert freed - before > 150 and trimmed - before < 50


def test_epochs_visit_every_mesh_once_in_new_order():
    data = MeshData(meshes(37), meshes(9), batch_size=8, seed=3)
    loader = data._loader(data.train, 8, 3)
    seen = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch) for batch in batches] == [8, 8, 8, 8, 5]
        seen.append(torch.cat(batches))
        assert torch.equal(
            seen[-1].flatten(1).sum(1).sort()[0], data.train.flatten(1).sum(1).sort()[0]
        )
    assert not torch.equal(seen[0], seen[1])


def test_nan_stops_early_and_keeps_the_last_good_epoch(tmp_path, hierarchy, monkeypatch):
    step = MeshTraining.training_step

    def poison(self, x, index):
        if self.current_epoch == 2:
            with torch.no_grad():
                self.model.autoencoder.to_latent.weight.fill_(float("nan"))
        return step(self, x, index)

    monkeypatch.setattr(MeshTraining, "training_step", poison)
    with pytest.raises(ValueError, match=r"finite loss .got nan at step \d+.: lower the learning"):
        run(hierarchy, tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_checkpoint_of_another_run_is_refused_and_kept(tmp_path, hierarchy):
    run(hierarchy, tmp_path, epochs=1)
    before = (tmp_path / "last.ckpt").read_bytes()
    other = MeshHierarchy.from_template(icosphere(1), factors=[3, 3])
    x, val = meshes(37), meshes(9, 1)
    kwargs = dict(epochs=1, batch_size=8, accelerator="cpu", resume=True, output=tmp_path)
    moved = [MorphableModel(model(hierarchy, "qem").autoencoder).fit]
    one = dict(resume=True, epochs=1)
    cases = [
        (lambda: model(other).fit(x, val, **kwargs), "this model, with"),
        (lambda: run(hierarchy, tmp_path, resume=True, epochs=2), r"epochs=2 .got 1"),
        (lambda: run(hierarchy, tmp_path, optimizer="sgd", **one), r"optimizer='sgd' .got 'one_"),
        (lambda: run(hierarchy, tmp_path, lr=0.1, **one), r"lr=0.1 .got 0.003"),
        (lambda: run(hierarchy, tmp_path, seed=3, **one), r"seed=3 .got 0"),
        (lambda: run(hierarchy, tmp_path, "qem", **one), r"model.down='qem' .got 'attention'"),
        (lambda: moved[0](x, val, **kwargs), r"model.down='qem'"),
        (
            lambda: model(hierarchy).fit(1.01 * x, val, **kwargs),
            r"training meshes.mean\[\d+, \d\]=",
        ),
    ]
    for case, message in cases:
        with pytest.raises(ValueError, match=message):
            case()
        assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_refused_resume_leaves_the_model_as_it_was(tmp_path, hierarchy):
    run(hierarchy, tmp_path, epochs=1)
    for summary in ({}, {"epochs": 3}):  # also of one that was trained before
        refused = model(hierarchy)
        refused.summary = dict(summary)
        before = {name: value.clone() for name, value in refused.state_dict().items()}
        with pytest.raises(ValueError, match="seed=3"):
            refused.fit(
                meshes(37),
                meshes(9, 1),
                epochs=1,
                batch_size=8,
                accelerator="cpu",
                output=tmp_path,
                resume=True,
                seed=3,
            )
        after = refused.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_damaged_checkpoints_are_refused(tmp_path, hierarchy):
    run(hierarchy, tmp_path, epochs=1)
    path = tmp_path / "last.ckpt"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            run(hierarchy, tmp_path, epochs=1, resume=True)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="something else"):
        run(hierarchy, tmp_path, epochs=1, resume=True)


class Evil:
    def __reduce__(self):
        return eval, ("1 / 0",)


def test_nothing_is_unpickled_from_a_checkpoint(tmp_path, hierarchy):
    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="whole checkpoint"):
        run(hierarchy, tmp_path, epochs=1, resume=True)


def test_bad_arguments(tmp_path, hierarchy):
    x, val = meshes(20), meshes(5, 1)
    broken = x.clone()
    broken[7, 2, 1] = float("nan")
    cases = [
        (dict(train=broken), "finite training meshes .got NaN or infinity in mesh 7"),
        (dict(train=x[:, :10]), "42 vertices as the template has .got 10"),
        (dict(val=val[..., :2]), r"validation meshes of shape \[M, N, 3\] .got \[5, 42, 2\]"),
        (dict(val=torch.cat([val, val], dim=-1)), "3 features a vertex .* .got 6"),
        (dict(train=x[:0]), r"training meshes of shape .*\[0, 42, 3\]"),
        (dict(epochs=0), "positive 'epochs'"),
        (dict(optimizer="slow"), "'optimizer' to be one of"),
        (dict(lr=-1.0), "positive 'lr'"),
        (dict(batch_size=0), "positive 'batch_size'"),
    ]
    (tmp_path / "last.ckpt").write_text("precious")
    for change, message in cases:
        arguments = dict(train=x, val=val, epochs=1, output=tmp_path, accelerator="cpu") | change
        untouched = model(hierarchy)
        before = {name: t.clone() for name, t in untouched.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            untouched.fit(**arguments)
        after = untouched.state_dict()
        assert all(torch.equal(after[name], t) for name, t in before.items())
    wrong = [
        (dict(max_epochs=3), "max_epochs"),
        (dict(acelerator="cpu"), "acelerator"),
        (dict(seed="x"), "seed"),
        (dict(transform=3), "transform"),
        (dict(train=["a"]), "tensor, an array"),
        (dict(train=x.long()), "floating point"),
    ]
    for change, message in wrong:
        arguments = dict(train=x, val=val, epochs=1, output=tmp_path, accelerator="cpu") | change
        with pytest.raises(TypeError, match=message):
            model(hierarchy).fit(**arguments)
    assert (tmp_path / "last.ckpt").read_text() == "precious"


def train_losses(output):
    lines = (next((output / "log").glob("version_*")) / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    return torch.tensor([float(row["train_loss"]) for row in rows if row["train_loss"]])


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["qem", "attention"])
def test_compiled_training_has_the_same_losses(tmp_path, hierarchy, pool):
    if " " in torch.__file__:
        pytest.skip("inductor cannot compile where torch lies in a path with a space")
    for name, compile in (("eager", False), ("compiled", True)):
        run(hierarchy, tmp_path / name, pool, epochs=3, compile=compile)
    losses = train_losses(tmp_path / "eager")
    assert len(losses) == 3 and losses[-1] < losses[0]
    torch.testing.assert_close(train_losses(tmp_path / "compiled"), losses, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_half_precision_trains_about_as_well(tmp_path, hierarchy):
    single = run(hierarchy, tmp_path / "single", epochs=8)
    half = run(hierarchy, tmp_path / "half", epochs=8, precision="bf16-mixed")
    errors = [m.evaluate(meshes(9, 1))["mean"] for m in (single, half)]
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
