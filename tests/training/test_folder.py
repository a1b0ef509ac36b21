r"""The folder of a training: its lock, whole checkpoints, and what makes them of one run."""

import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pl = pytest.importorskip("pytorch_lightning")

from pyg_attnpool.mesh import MeshHierarchy  # noqa: E402
from pyg_attnpool.models import MorphableModel  # noqa: E402
from pyg_attnpool.nn import AttentionPool, AttentionUnpool  # noqa: E402
from pyg_attnpool.training import MeshTraining, jitter, load_checkpoint  # noqa: E402
from pyg_attnpool.training.folder import save_checkpoint  # noqa: E402
from tests.mesh.meshes import icosphere  # noqa: E402
from tests.training.test_fit import SMALL, Killed, equal, meshes, model, run  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(icosphere(1), factors=[3, 2])


# Whole ################################################################################


def test_one_flipped_bit_anywhere_is_noticed(tmp_path, hierarchy):
    run(hierarchy, tmp_path, epochs=1)
    path = tmp_path / "last.ckpt"
    whole = path.read_bytes()
    assert load_checkpoint(path)["epoch"] == 0
    assert torch.load(path, weights_only=True)["epoch"] == 0  # it still is an archive of torch
    places = [*range(0, len(whole), 97), *range(len(whole) - 100, len(whole))]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="whole checkpoint in .*" + re.escape(str(path))):
            load_checkpoint(path)
    for size in (0, 1, 63, 64, 65, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="whole checkpoint"):
            load_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="whole checkpoint"):
        load_checkpoint(path)


def test_the_best_checkpoint_helps_out_for_a_damaged_last_one(tmp_path, hierarchy):
    whole = run(hierarchy, tmp_path / "whole", optimizer="sgd")
    folder = tmp_path / "damaged"
    run(hierarchy, folder, optimizer="sgd", epochs=2)
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1])
    resume = dict(optimizer="sgd", resume=True)
    message = r"last.ckpt.*best.ckpt is whole, of the same run and of the end of epoch 2; copy it"
    with pytest.raises(ValueError, match=message):
        run(hierarchy, folder, **resume)
    with pytest.raises(ValueError, match=r"last.ckpt.*: train without resuming"):
        run(hierarchy, folder, seed=1, **resume)  # the best one is of another run
    shutil.copy(best, last)
    assert equal(run(hierarchy, folder, **resume), whole)
    best.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"whole checkpoint in .*best.ckpt"):
        run(hierarchy, folder, **resume)
    best.unlink()
    with pytest.raises(ValueError, match=r"best.ckpt beside last.ckpt .got no such file"):
        run(hierarchy, folder, **resume)


def test_a_folder_may_move_between_two_runs(tmp_path, hierarchy, monkeypatch):
    # The best epoch is the first, whose score the second run needs to know.
    scores = [1.0, 3.0, 2.0, 4.0]
    monkeypatch.setattr(
        MeshTraining,
        "on_validation_epoch_end",
        lambda self: self.log("val_mm", scores[self.current_epoch]),
    )
    run(hierarchy, tmp_path / "before", optimizer="sgd", epochs=2)
    first = load_checkpoint(tmp_path / "before" / "best.ckpt")["state_dict"]
    shutil.move(tmp_path / "before", tmp_path / "after")
    resumed = run(hierarchy, tmp_path / "after", optimizer="sgd", resume=True)
    for name, value in resumed.named_parameters():
        assert torch.equal(value, first[f"model.{name}"])
    assert resumed.summary["validation error (mm)"] == 1.0 and resumed.summary["steps"] == 20


def test_older_checkpoints_stay_until_an_epoch_is_validated(tmp_path, hierarchy, monkeypatch):
    run(hierarchy, tmp_path, epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.ckpt")}
    assert before.keys() == {"best.ckpt", "last.ckpt"}

    def kill_in(epoch):
        def kill(self):
            if self.current_epoch == epoch:
                raise Killed

        monkeypatch.setattr(MeshTraining, "on_validation_epoch_start", kill)

    kill_in(0)
    with pytest.raises(Killed):
        run(hierarchy, tmp_path, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.ckpt")} == before
    kill_in(1)
    with pytest.raises(Killed):
        run(hierarchy, tmp_path, seed=1)
    after = [load_checkpoint(tmp_path / name) for name in before]
    assert [checkpoint["settings"]["seed"] for checkpoint in after] == [1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint({"state_dict": {"weight": torch.ones(3)}}, path)
    before = path.read_bytes()
    script = f"""
import resource, torch
from pathlib import Path
from pyg_attnpool.training.folder import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
save_checkpoint({{"state_dict": {{"weight": torch.ones(1 << 20)}}}}, Path({str(path)!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "OSError" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"] and path.read_bytes() == before


# Of one run ###########################################################################

DATA = dict(train=meshes(37), val=meshes(9, 1))
PUBLISHED = dict(variant="published", latent_activation=None)
OTHER = meshes(37)
OTHER[5] += 1e-3
DIFFERENT = {
    "k": (dict(down_kwargs=dict(channels=5, k=3)), {}, r"model.down_kwargs.k=3 .got None."),
    "k up": (dict(up_kwargs=dict(channels=5, k=3)), {}, r"model.up_kwargs.k=3 .got 4."),
    "activation": (dict(activation="elu"), {}, "model.activation='elu' .got 'relu'."),
    "latent": (dict(latent_activation="relu"), {}, "model.latent_activation='relu' .got None."),
    "K": (dict(conv_kwargs=dict(K=5)), {}, r"model.conv_kwargs.K=5 .got 6."),
    "variant": (PUBLISHED, {}, "model.variant='published' .got 'default'."),
    "optimizer": ({}, dict(optimizer="adam"), "optimizer='adam' .got 'sgd'."),
    "lr": ({}, dict(lr=0.1), "lr=0.1 .got 0.008."),
    "loss": ({}, dict(loss=torch.nn.functional.mse_loss), "loss='mse_loss' .got 'l1_loss'."),
    "transform": ({}, dict(transform=jitter(0.2)), "transform.std=0.2 .got 0.1."),
    "batch size": ({}, dict(batch_size=9), "batch_size . processes=9 .got 8."),
    "epochs": ({}, dict(epochs=1), "epochs=1 .got 2."),
    "seed": ({}, dict(seed=1), "seed=1 .got 0."),
    "precision": ({}, dict(precision="bf16-mixed"), "precision='bf16-mixed' .got '32-true'."),
    "clipping": ({}, dict(gradient_clip_val=0.5), "gradient_clip_val=0.5 .got None."),
    "accumulation": ({}, dict(accumulate_grad_batches=2), "accumulate_grad_batches=2 .got 1."),
    "number of meshes": ({}, dict(train=meshes(36)), "meshes.training=36 .got 37."),
    "number to validate": ({}, dict(val=meshes(8, 1)), "meshes.validation=8 .got 9."),
    "one mesh": ({}, dict(train=OTHER), r"training meshes.mean\[\d+, \d\]="),
    "other validation": ({}, dict(val=meshes(9, 2)), r"validation meshes.mean\[\d+, \d\]="),
}


@pytest.fixture(scope="module")
def resumable(tmp_path_factory, hierarchy):
    folder = tmp_path_factory.mktemp("resumable")
    return folder, lambda model, **kwargs: model.fit(
        **dict(
            **DATA,
            epochs=2,
            batch_size=8,
            optimizer="sgd",
            transform=jitter(0.1),
            accelerator="cpu",
            output=folder,
            resume=True,
        )
        | kwargs
    )


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_run_of_another_setting_is_refused_by_its_name(resumable, hierarchy, name):
    folder, fit = resumable

    def build(**kwargs):
        attention = dict(down_kwargs=dict(channels=5), up_kwargs=dict(channels=5, k=4))
        return MorphableModel.coma(hierarchy, 2, **(SMALL | attention | kwargs))

    if not (folder / "last.ckpt").exists():
        fit(build())
    of_model, of_fit, message = DIFFERENT[name]
    before = (folder / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match="run with " + message):
        fit(build(**of_model), **of_fit)
    assert (folder / "last.ckpt").read_bytes() == before


def test_a_run_on_other_levels_of_the_same_sizes_is_refused(tmp_path, hierarchy):
    run(hierarchy, tmp_path, epochs=1)
    vertices, faces = icosphere(1)
    stretched = MeshHierarchy.from_template((vertices * [1, 2, 3], faces), factors=[3, 2])
    assert stretched.num_vertices == hierarchy.num_vertices
    with pytest.raises(ValueError, match="run with template="):
        run(stretched, tmp_path, epochs=1, resume=True)
    network = model(stretched).autoencoder
    with pytest.raises(ValueError, match="run with hierarchy="):
        MorphableModel(network, icosphere(1)).fit(
            **DATA, epochs=1, batch_size=8, accelerator="cpu", output=tmp_path, resume=True
        )


def test_what_an_optimizer_of_ones_own_makes_is_compared(tmp_path, hierarchy):
    def fit(optimizer):
        run(hierarchy, tmp_path, epochs=1, optimizer=optimizer, resume=True)

    def two_rates(parameters):
        first, *others = parameters
        return torch.optim.Adam([{"params": [first], "lr": RATES[0]}, {"params": others}], RATES[1])

    def refused(optimizer, message):
        with pytest.raises(ValueError, match="run with " + message):
            fit(optimizer)

    fit(lambda p: torch.optim.AdamW(p, lr=1e-3))
    fit(lambda p: torch.optim.AdamW(p, lr=1e-3))  # the same goes on
    refused(lambda p: torch.optim.AdamW(p, lr=1e-2), r"made optimizer.lr=0.01 .got 0.001.")
    refused(lambda p: torch.optim.Adam(p, lr=1e-3), r"made optimizer.class='Adam' .got 'AdamW'.")
    betas = (0.9, 0.99)
    message = r"made optimizer.betas=\[0.9, 0.99\] .got \[0.9, 0.999\]."
    refused(lambda p: torch.optim.AdamW(p, lr=1e-3, betas=betas), message)
    refused(partial(torch.optim.AdamW, lr=1e-3), "optimizer.function='AdamW' .got None.")
    refused("adam", r"optimizer='adam' .got '.*<lambda>'.")
    shutil.rmtree(tmp_path)
    RATES = [1e-2, 1e-3]
    fit(two_rates)
    RATES = [1e-2, 1e-4]
    refused(two_rates, r"made optimizer.group 1.lr=0.0001 .got 0.001.")


def test_checkpoints_with_the_name_of_an_optimizer_alone_go_on(tmp_path, hierarchy):
    # As they were before what it makes was written down.
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=1e-3)

    run(hierarchy, tmp_path, epochs=1, optimizer=optimizer)
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = load_checkpoint(tmp_path / name)
        assert checkpoint["settings"].pop("made optimizer")["lr"] == 1e-3
        save_checkpoint(checkpoint, tmp_path / name)
    longer = run(hierarchy, tmp_path, epochs=2, optimizer=optimizer, resume=True)
    assert longer.summary["steps"] == 10
    assert longer.summary["optimizer"] == optimizer.__qualname__
    with pytest.raises(ValueError, match="run with optimizer='sgd'"):
        run(hierarchy, tmp_path, epochs=2, optimizer="sgd", resume=True)


class Own(torch.nn.Module):
    # What two of these compute differs where their states have the same shapes.
    latent_channels = 2

    def __init__(self, k=2, activation=torch.relu, slope=0.1):
        super().__init__()
        self.pool, self.unpool = AttentionPool(42, 9, k=k), AttentionUnpool(9, 42, k=4)
        self.down, self.up = torch.nn.Linear(27, 2), torch.nn.Linear(2, 27)
        self.leaky = torch.nn.LeakyReLU(slope)
        self.activation = activation

    def encode(self, x):
        return self.down(self.activation(self.pool(x)).flatten(1))

    def decode(self, z):
        return self.unpool(self.leaky(self.up(z)).view(-1, 9, 3))

    def forward(self, x):
        return self.decode(self.encode(x))


def test_settings_of_an_own_network_are_compared(tmp_path):
    def fit(**kwargs):
        return MorphableModel(Own(**kwargs), icosphere(1)).fit(
            **DATA, epochs=1, accelerator="cpu", output=tmp_path, resume=True
        )

    fit()
    fit()  # the same goes on
    cases = [
        (dict(k=3), r"model.pool.k=3 .got 2."),
        (dict(activation=torch.tanh), r"model.activation='.*tanh' .got '.*relu'."),
        (dict(slope=0.2), r"model.leaky.negative_slope=0.2 .got 0.1."),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match="run with " + message):
            fit(**kwargs)


# The lock #############################################################################


@pytest.mark.slow
def test_a_killed_training_releases_its_folder(tmp_path, hierarchy):
    script = f"""
import time
import pytorch_lightning as pl
from tests.training.test_folder import MeshHierarchy, icosphere, run

class Wait(pl.Callback):
    def on_train_start(self, trainer, module):
        print("waiting", flush=True)
        time.sleep(300)

if __name__ == "__main__":
    hierarchy = MeshHierarchy.from_template(icosphere(1), factors=[3, 2])
    run(hierarchy, {str(tmp_path)!r}, epochs=1, callbacks=[Wait()], enable_progress_bar=False)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout.readline().strip()
            with pytest.raises(ValueError, match="no training writes to .*one is running") as error:
                run(hierarchy, tmp_path, epochs=1)
            assert "\n" not in str(error.value)
        finally:
            process.kill()
    for _ in range(50):  # the system may take a moment
        try:
            run(hierarchy, tmp_path, epochs=1)
            break
        except ValueError:
            time.sleep(0.1)
    assert load_checkpoint(tmp_path / "last.ckpt")["epoch"] == 0
