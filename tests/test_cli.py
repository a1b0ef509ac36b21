r"""The command line, from a folder of scans to a file that is sent."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.spatial import Delaunay, procrustes

from pyg_attnpool import MorphableModel
from pyg_attnpool.datasets import RegisteredMeshes, cache
from pyg_attnpool.mesh import read_mesh, write_mesh
from pyg_attnpool.models.plan import run_plan
from pyg_attnpool.training import load_checkpoint
from pyg_attnpool.visualize import read_viewer
from pyg_attnpool.visualize.page import read_page
from tests.mesh.meshes import blob

for name in ("tyro", "pytorch_lightning"):
    pytest.importorskip(name)
main = importlib.import_module("pyg_attnpool.cli").main


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    r"""A folder of 40 stretched blobs of some 10 cm, in millimetres."""
    folder = tmp_path_factory.mktemp("scans")
    vertices, faces = blob(4, seed=0)
    stretch = np.random.default_rng(0).uniform(90, 110, size=(40, 1, 3))
    for i, mesh in enumerate(stretch * vertices):
        write_mesh(folder / f"{i}.ply", mesh, faces)
    return folder


@pytest.fixture(scope="module")
def run(scans, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "blobs"
    assert main(["train", str(scans), "-o", str(output), "--unit", "mm", "--steps", "4"]) == 0
    return output


def test_train_saves_a_frozen_model_that_python_loads(run, scans):
    model = MorphableModel.load(run / "model")
    meshes = RegisteredMeshes(scans, unit="mm")
    errors = model.evaluate(meshes[meshes.split().test])
    shown = model.summary["test error (mm)"]
    assert shown == {name: pytest.approx(errors[name], rel=1e-3) for name in shown}
    assert model.unit == "mm" and not any("key" in name for name, _ in model.named_parameters())


def test_evaluate_prints_the_error_in_millimetres(run, scans, capsys):
    assert main(["evaluate", str(run), str(scans), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, meshes = MorphableModel.load(run / "model"), RegisteredMeshes(scans, unit="mm").vertices
    with torch.no_grad():
        distances = 1000 * (model(meshes) - meshes).double().norm(dim=-1)
    assert found["mean"] == pytest.approx(distances.mean().item(), rel=1e-4)
    assert found["std"] == pytest.approx(distances.std(correction=0).item(), rel=1e-4)


def test_pca_is_exact_for_shapes_that_three_numbers_make(scans, tmp_path, capsys):
    command = ["train", str(scans), "-o", str(tmp_path), "--unit", "mm"]
    assert main([*command, "--model", "pca", "--latent", "3"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), str(scans), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] < 1e-3


def test_info_says_what_the_model_is(run, capsys):
    assert main(["info", str(run / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latent channels"] == 8 and found["unit of files"] == "mm"
    assert found["vertices"] == len(blob(4, seed=0)[0]) and found["epochs"] >= 2


def test_meshes_that_are_only_moved_are_noticed(scans, tmp_path, capsys):
    vertices, faces = blob(4, seed=0)
    for i, move in enumerate(np.random.default_rng(1).uniform(-1, 1, size=(20, 3))):
        write_mesh(tmp_path / "moved" / f"{i}.ply", vertices + 3 * move, faces)
    command = ["train", str(tmp_path / "moved"), "-o", str(tmp_path / "run"), "--model", "pca"]
    assert main(command) == 0 and "--align" in capsys.readouterr().out
    command.append("--overwrite")
    assert main([*command, "--align"]) == 0 and "--align" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def linear(scans, tmp_path_factory):
    r"""PCA with three components, in which the scans lie exactly."""
    output = tmp_path_factory.mktemp("runs") / "linear"
    command = ["train", str(scans), "-o", str(output), "--unit", "mm"]
    assert main([*command, "--model", "pca", "--latent", "3"]) == 0
    return output


def read(path):
    return torch.from_numpy(read_mesh(path)[0])


def stretched(factors):
    return torch.from_numpy(blob(4, seed=0)[0]) * torch.tensor(factors)


def write(path, mesh):
    write_mesh(path, mesh.numpy(), blob(4, seed=0)[1])
    return str(path)


def test_a_run_is_replaced_only_if_asked_to(scans, tmp_path, capsys):
    command = ["train", str(scans), "-o", str(tmp_path / "run"), "--unit", "mm", "--model", "pca"]
    assert main([*command, "--latent", "2"]) == 0
    model = MorphableModel.load(tmp_path / "run")  # the folder around it
    assert model.latent_channels == 2
    capsys.readouterr()
    assert main([*command, "--latent", "3"]) == 1
    error = capsys.readouterr().err
    assert "--resume" in error and "--overwrite" in error
    assert MorphableModel.load(tmp_path / "run" / "model").latent_channels == 2
    assert main([*command, "--latent", "3", "--overwrite"]) == 0
    assert MorphableModel.load(tmp_path / "run").latent_channels == 3


def test_a_training_that_was_cut_off_says_so(tmp_path, capsys):
    (tmp_path / "last.ckpt").touch()
    assert main(["info", str(tmp_path)]) == 1
    assert "cut off" in capsys.readouterr().err


def test_meshes_of_another_size_are_noticed(linear, scans, tmp_path, capsys):
    for path in sorted(scans.glob("*.ply"))[:3]:
        vertices, faces = read_mesh(path)
        write_mesh(tmp_path / path.name, vertices / 10, faces)  # centimetres
    assert main(["evaluate", str(linear), str(tmp_path), "--samples", "4"]) == 0
    found = capsys.readouterr().err
    assert re.search(r"is 0\.1\d* times as large as the model: is its unit mm\?", found)
    small, walk = sorted(tmp_path.glob("*.ply"))[0], tmp_path / "walk"
    command = ["interpolate", str(linear), str(small), str(small), "-o", str(walk)]
    assert main([*command, "--steps", "2"]) == 0
    assert f"What {small} holds is 0.1" in capsys.readouterr().err
    assert main(["evaluate", str(linear), str(scans), "--samples", "4"]) == 0
    assert "as large" not in capsys.readouterr().err


def test_evaluate_takes_a_single_mesh(linear, scans, capsys):
    assert main(["evaluate", str(linear), str(scans / "7.ply"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    meshes = RegisteredMeshes(scans, unit="mm")
    expected = MorphableModel.load(linear).evaluate(meshes[[meshes.name.index("7.ply")]])
    assert found["mean"] == pytest.approx(expected["mean"])
    assert main(["evaluate", str(linear), str(scans / "none.ply")]) == 1
    assert "none.ply" in capsys.readouterr().err


def test_evaluate_says_what_the_models_own_meshes_are_like(linear, scans, capsys):
    assert main(["evaluate", str(linear), str(scans), "--json", "--samples", "40"]) == 0
    found = json.loads(capsys.readouterr().out)
    meshes = RegisteredMeshes(scans, unit="mm").vertices
    x = meshes.double().flatten(1)
    variance = np.linalg.svd((x - x.mean(dim=0)).numpy(), compute_uv=False) ** 2
    assert found["compactness"] == pytest.approx(variance[0] / variance.sum(), rel=1e-3)
    assert found["generalisation"] == pytest.approx(found["mean"]) and found["mean"] < 1e-3
    # Three axes that vary by a tenth, of samples as of scans.
    assert 0 < found["specificity"] < found["diversity"] < 2 * found["diversity of test meshes"]
    assert main(["evaluate", str(linear), str(scans)]) == 0
    shown = capsys.readouterr().out
    for name in ("specificity", "compactness", "diversity", "generalisation"):
        assert f"\n{name} " in shown


def test_evaluate_reads_the_features_of_the_model(tmp_path, capsys):
    vertices, faces = blob(2, seed=0)
    stretch = np.random.default_rng(0).uniform(0.9, 1.1, size=(12, 1, 3))
    x = torch.from_numpy(0.1 * stretch * vertices).float()
    brightness = 1000 * x[..., :1].abs().sum(dim=1, keepdim=True).expand(-1, len(vertices), 1)
    meshes = torch.cat([x, brightness], dim=2)
    model = MorphableModel.pca((0.1 * vertices, faces), 4, in_channels=4)
    model.fit(meshes).features = ("brightness",)
    for i, mesh in enumerate(meshes):
        model.write_mesh(tmp_path / "scans" / f"{i}.ply", mesh)
    model.save(tmp_path / "model")
    assert main(["evaluate", str(tmp_path / "model"), str(tmp_path / "scans"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] < 1e-3


def strict(text):
    r"""JSON as the standard has it, without NaN and infinity."""

    def refuse(name):
        raise AssertionError(f"no JSON: {name}")

    return json.loads(text, parse_constant=refuse)


def test_what_has_no_value_is_null_and_a_dash(linear, scans, tmp_path, capsys):
    for name in ("a.ply", "b.ply"):  # one mesh, twice: no direction has any of the variance
        shutil.copy(scans / "0.ply", tmp_path / name)
    assert main(["evaluate", str(linear), str(tmp_path), "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["compactness"] is None and found["diversity"] > 0
    assert main(["evaluate", str(linear), str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert re.search(r"compactness +-  of the variance", shown.out) and "nan" not in shown.out
    assert "Comparing" in shown.err
    # Of a single mesh the same names, so that a script finds them.
    assert main(["evaluate", str(linear), str(tmp_path / "a.ply"), "--json"]) == 0
    one = strict(capsys.readouterr().out)
    assert one.keys() == found.keys() and one["diversity"] is None
    assert one["generalisation"] == one["mean"]


def test_a_model_of_the_package_goes_by_its_name(linear, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["info", "hands", "--json"]) == 0
    shown = capsys.readouterr()
    assert strict(shown.out)["vertices"] == MorphableModel.from_pretrained("hands").num_vertices
    assert "comes with the package" in shown.err
    assert main(["view", "hands-32", "--no-open"]) == 0
    content = read_viewer((tmp_path / "hands-32.html").read_text("utf-8"))
    assert len(content["latent"]["std"]) == 32 and content["title"] == "hands-32"
    # "hands/" is a folder, and so is "hands" where there is one.
    assert main(["info", "hands/"]) == 1
    shutil.copytree(linear / "model", tmp_path / "hands")
    capsys.readouterr()
    assert main(["info", "hands", "--json"]) == 0
    assert strict(capsys.readouterr().out)["network"] == "PCA"


def test_export_says_what_takes_its_time(linear, tmp_path, capsys):
    path = tmp_path / "model.pt2"
    assert main(["export", str(linear), str(path)]) == 0
    shown = capsys.readouterr()
    assert f"Writing {path}: some seconds" in shown.err and "gives what the model" in shown.out
    x = stretched([0.095, 0.104, 0.1]).float()[None]
    torch.testing.assert_close(torch.export.load(path).module()(x), MorphableModel.load(linear)(x))


def test_sample_writes_the_models_own_samples(linear, tmp_path, capsys):
    assert main(["sample", str(linear), "-o", str(tmp_path / "new"), "--n", "3"]) == 0
    model = MorphableModel.load(linear / "model")
    expected = model.sample(3, generator=torch.Generator().manual_seed(0))
    for i, mesh in enumerate(expected):
        found = read(tmp_path / "new" / f"sample_{i}.ply")
        torch.testing.assert_close(found.float(), 1000 * mesh)  # in the unit of the files


def test_interpolate_passes_through_the_middle(linear, tmp_path):
    a, b = stretched([95.0, 100, 105]), stretched([105.0, 105, 95])
    names = write(tmp_path / "a.ply", a), write(tmp_path / "b.obj", b)
    folder = tmp_path / "walk"
    assert main(["interpolate", str(linear), *names, "-o", str(folder), "--steps", "3"]) == 0
    for i, expected in enumerate((a, (a + b) / 2, b)):
        torch.testing.assert_close(read(folder / f"step_{i}.ply"), expected, atol=1e-2, rtol=0)


def test_interpolate_draws_a_film(linear, scans, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    film = tmp_path / "walk.gif"
    command = ["interpolate", str(linear), str(scans / "0.ply"), str(scans / "1.ply")]
    assert main([*command, "-o", str(film), "--steps", "4"]) == 0
    with Image.open(film) as image:
        assert image.n_frames == 4


def test_transfer_adds_the_difference(linear, tmp_path):
    shapes = [[95.0, 100, 100], [105.0, 100, 97], [100.0, 95, 100]]
    names = [write(tmp_path / f"{i}.ply", stretched(s)) for i, s in enumerate(shapes)]
    assert main(["transfer", str(linear), *names, "-o", str(tmp_path / "out.ply")]) == 0
    expected = stretched([110.0, 95, 97])
    torch.testing.assert_close(read(tmp_path / "out.ply"), expected, atol=1e-2, rtol=0)


def turned(mesh):
    r"""By 40 degrees about z, and moved by three centimetres."""
    c, s = np.cos(np.deg2rad(40)), np.sin(np.deg2rad(40))
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return mesh @ turn.T + torch.tensor([30.0, -10, 5])


@pytest.mark.slow
def test_fit_registers_scans_of_other_topology(linear, tmp_path, capsys):
    truth = turned(stretched([95.0, 104, 100]))
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    faces = torch.argsort(order)[torch.from_numpy(blob(4, seed=0)[1])]
    (tmp_path / "scans").mkdir()
    # Shuffled vertices, and what lies behind a plane is missing.
    kept = truth[order][faces][..., 0].mean(dim=1) < truth[:, 0].quantile(0.85)
    write_mesh(tmp_path / "scans" / "a.ply", *used(truth[order], faces[kept]))
    write(tmp_path / "scans" / "b.ply", turned(stretched([100.0, 95, 103])))
    command = ["fit", str(linear), str(tmp_path / "scans"), "-o", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    a, b = json.loads(capsys.readouterr().out)
    assert a["converged"] and a["mean"] < 0.3 and b["mean"] < 0.3
    found = read(tmp_path / "out" / "a.ply")
    assert (found - truth).norm(dim=1).mean() < 0.5  # mm, vertex by vertex

    # The code of a fit is a shape for other commands.
    (tmp_path / "a.json").write_text(json.dumps(a))
    edited = ["edit", str(linear), str(tmp_path / "a.json"), "-o", str(tmp_path / "e.ply")]
    assert main([*edited, "--by", "0", "0", "0", "0"]) == 0
    expected = stretched([95.0, 104, 100])
    assert (read(tmp_path / "e.ply") - expected).norm(dim=1).mean() < 0.5

    # Only what is missing is made again.
    (tmp_path / "out" / "b.ply").unlink()
    before = (tmp_path / "out" / "a.ply").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert "1 of 1 scans" in capsys.readouterr().out
    assert (tmp_path / "out" / "b.ply").exists()
    assert (tmp_path / "out" / "a.ply").stat().st_mtime_ns == before


def test_fit_registers_point_clouds(linear, tmp_path, capsys):
    truth = turned(stretched([95.0, 104, 100]))
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    points = truth[order].numpy()
    folder = tmp_path / "clouds"
    folder.mkdir()
    np.save(folder / "a.npy", points)
    np.savetxt(folder / "b.xyz", points)
    header = "".join(f"property double {axis}\n" for axis in "xyz")
    header = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\n{header}end_header\n"
    (folder / "c.ply").write_text(header + (folder / "b.xyz").read_text())
    assert main(["fit", str(linear), str(folder), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert [record["converged"] for record in json.loads(capsys.readouterr().out)] == [True] * 3
    for name in "abc":
        found = read(tmp_path / "out" / f"{name}.ply")
        assert (found - truth).norm(dim=1).mean() < 0.5  # mm


def test_fit_of_one_scan_shows_how_long_it_takes(linear, tmp_path, monkeypatch, capsys):
    write(tmp_path / "scan.ply", turned(stretched([95.0, 104, 100])))
    command = ["fit", str(linear), str(tmp_path / "scan.ply"), "-o", str(tmp_path / "out.ply")]
    # As a scan would that takes two seconds.
    bar, now = cache.tqdm, {"delay": 0, "mininterval": 0}
    monkeypatch.setattr(cache, "tqdm", lambda **kwargs: bar(**{**kwargs, **now}))
    assert main(command) == 0
    assert re.search(r"steps at most.* \d+/60 \[\d\d:\d\d<\d\d:\d\d", capsys.readouterr().err)


def used(vertices, faces):
    kept, faces = torch.unique(faces, return_inverse=True)
    return vertices[kept].numpy(), faces.numpy()


def test_fit_starts_from_landmarks(linear, tmp_path):
    truth = stretched([95.0, 104, 100]) @ torch.diag(torch.tensor([-1.0, -1, 1])).double()
    write(tmp_path / "scan.ply", truth)
    marks = {i: truth[i].tolist() for i in range(0, len(truth), len(truth) // 6)}
    (tmp_path / "marks.json").write_text(json.dumps(marks))
    command = ["fit", str(linear), str(tmp_path / "scan.ply"), "-o", str(tmp_path / "out.ply")]
    assert main([*command, "--landmarks", str(tmp_path / "marks.json")]) == 0
    assert (read(tmp_path / "out.ply") - truth).norm(dim=1).mean() < 0.5


@pytest.mark.slow
def test_one_bad_scan_of_a_folder_is_named_and_the_others_are_fitted(linear, tmp_path, capsys):
    write(tmp_path / "scans" / "a.ply", stretched([95.0, 104, 100]))
    (tmp_path / "scans" / "b.ply").write_bytes(b"ply, but not really")
    write_mesh(tmp_path / "scans" / "c.ply", *plane())
    command = ["fit", str(linear), str(tmp_path / "scans"), "-o", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 1
    streams = capsys.readouterr()
    a, b, c = json.loads(streams.out)
    assert a["converged"] and "b.ply" in b["error"] and "c.ply" in c["error"]
    assert "b.ply" in streams.err and "c.ply" in streams.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.ply"]


def test_edit_moves_a_vertex_and_what_belongs_to_it(linear, tmp_path, capsys):
    start = stretched([100.0, 100, 100])
    tip = int(start[:, 2].argmax())
    # Stretched along z by a twentieth, the tip is there.
    step = start[tip, 2].item() / 20
    command = ["edit", str(linear), write(tmp_path / "a.ply", start), "-o", str(tmp_path / "b.ply")]
    command += ["--by", str(tip), "0", "0", str(step), "--noise", "0.001"]
    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = read(tmp_path / "b.ply")
    assert shown["residuals"][str(tip)] < 0.1
    torch.testing.assert_close(found[tip, 2].item(), 1.05 * start[tip, 2].item(), rtol=1e-3, atol=0)
    torch.testing.assert_close(found, stretched([100.0, 100, 105]), atol=1.0, rtol=0)
    place = [str(x) for x in found[tip].tolist()]
    command = [*command[:5], "--to", str(tip), *place, "--noise", "0.001"]
    assert main(command) == 0
    torch.testing.assert_close(read(tmp_path / "b.ply"), found, atol=0.05, rtol=0)


def test_models_of_aligned_meshes_take_meshes_in_any_pose(scans, tmp_path):
    r"""The model says that its meshes were aligned, so nobody has to."""
    for i, file in enumerate(sorted(scans.iterdir())[:20]):
        write(tmp_path / "turned" / f"{i}.ply", turned(read(file)) if i % 2 else read(file))
    command = ["train", str(tmp_path / "turned"), "-o", str(tmp_path / "run"), "--unit", "mm"]
    assert main([*command, "--model", "pca", "--latent", "3", "--align"]) == 0
    names = [str(tmp_path / "turned" / f"{i}.ply") for i in (0, 1)]
    folder = tmp_path / "walk"
    assert main(["interpolate", str(tmp_path / "run"), *names, "-o", str(folder)]) == 0
    ends = [read(folder / f"step_{i}.ply") for i in (0, 9)]
    for end, name in zip(ends, names, strict=True):
        truth = read(name)
        _, _, distance = procrustes(end.numpy(), truth.numpy())
        assert distance < 1e-6
    # Both ends are in one pose: less than 10 percent of stretching apart, not 40 degrees.
    assert (ends[0] - ends[1]).norm(dim=1).mean() < 20


def test_view_writes_a_page_and_opens_it(linear, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    monkeypatch.setenv("DISPLAY", ":0")
    page = tmp_path / "page.html"
    assert main(["view", str(linear), "-o", str(page), "--no-open"]) == 0 and not opened
    content = read_viewer(page.read_text("utf-8"))
    model = MorphableModel.load(linear / "model")
    code = model.latent_mean.unsqueeze(0)
    expected = model.decode(code).numpy()
    np.testing.assert_allclose(run_plan(content["plan"], code.numpy()), expected, atol=1e-5)
    assert content["title"] == "linear"
    assert main(["view", str(linear)]) == 0
    page = linear.with_name("linear.html")
    assert opened == [page.as_uri()] and page.exists()


def test_report_tests_on_meshes_that_training_has_not_seen(run, scans, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(run), "--no-open"]) == 0
    page = run / "report.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text("utf-8")
    meshes = RegisteredMeshes(scans, unit="mm")
    test = meshes[meshes.split().test]
    assert f"{len(test)} test meshes" in text and "validation error" in text
    errors = MorphableModel.load(run / "model").evaluate(test)
    assert f"<td>{errors['mean']:.3f}</td>" in text
    content = read_page(text)
    assert {mesh["name"] for mesh in content["meshes"]} <= set(test.name)
    # Of other meshes where they are named.
    command = ["report", str(run), "-o", str(tmp_path / "a.html"), "--data", str(scans)]
    assert main([*command, "--no-open"]) == 0
    assert f"{len(meshes)} test meshes" in (tmp_path / "a.html").read_text("utf-8")


def test_a_folder_of_scans_becomes_a_page_in_three_commands(scans, tmp_path, monkeypatch, capsys):
    r"""As a newcomer types them, in the folder where the scans are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").symlink_to(scans, target_is_directory=True)
    for line in (
        "train scans/ -o faces/ --unit mm --steps 4",
        "evaluate faces/ scans/",
        "view faces/ --no-open",
    ):
        assert main(line.split()) == 0
    assert "mm per vertex" in capsys.readouterr().out
    content = read_viewer((tmp_path / "faces.html").read_text("utf-8"))
    assert len(content["latent"]["std"]) == 8
    model = MorphableModel.load(tmp_path / "faces" / "model")
    code = model.latent_mean.unsqueeze(0)
    with torch.no_grad():
        expected = model.decode(code).numpy()
    np.testing.assert_allclose(run_plan(content["plan"], code.numpy()), expected, atol=1e-5)


SHAPE = ["{scans}/0.ply", "{scans}/1.ply", "{scans}/2.ply"]


@pytest.mark.parametrize(
    "command, line",
    [
        (["train", "nowhere", "-o", "run"], "nowhere"),
        (["train", "empty", "-o", "run"], "empty"),
        (["train", "{scans}", "-o", "run", "--steps", "0"], "positive '--steps'"),
        (["train", "{scans}", "-o", "run.pt"], "a folder to write to (got run.pt)"),
        (["train", "{scans}", "-o", "bad.json"], "a folder to write to (got bad.json)"),
        # What can be known before is refused before the files are read: these are broken.
        (["train", "broken", "-o", "run", "--seed", "-5"], "non-negative '--seed' (got -5)"),
        (["train", "broken", "-o", "run", "--seed", str(2**70)], "'--seed' below"),
        (
            ["train", "broken", "-o", "run", "--latent", "100"],
            "--latent of at most 30, fewer than the 31 meshes",
        ),
        (["train", "broken", "-o", "run"], "broken/0.ply"),
        (["train", "other", "-o", "run"], "meshes for three parts"),
        (["train", "m.npy", "--template", "plane.ply", "-o", "run", "--latent", "40"], "--latent"),
        (
            ["train", "{scans}", "-o", "run", "--unit", "mm", "--model", "pca", "--latent", "0"],
            "latent",
        ),
        (
            ["info", "nowhere"],
            "the folder of a model, or the name of one that comes with the package",
        ),
        (["info", "empty"], "config.json"),
        (["info", "later"], "later release"),
        (["evaluate", "{run}", "other"], "vertices"),
        (["evaluate", "{run}", "empty"], "empty"),
        (["evaluate", "{run}", "{scans}", "--train", "other"], "vertices"),
        (["evaluate", "{run}", "{scans}", "--samples", "1"], "at least 2 '--samples'"),
        (["evaluate", "{run}", "{scans}", "--seed", "-1"], "non-negative '--seed'"),
        (["evaluate", "later", "{scans}"], "later release"),
        (["export", "{run}", "model.stl"], ".html or .onnx or .pt2 to write to (got model.stl)"),
        (["export", "{run}", "whole.onnx"], "(got whole.onnx)"),  # a folder
        (["export", "later", "model.onnx"], "later release"),
        (["view", "{run}", "-o", "page.txt"], "page.txt"),
        (["view", "{run}", "-o", "page.html", "--data", "other"], "vertices"),
        (["view", "later", "-o", "page.html"], "later release"),
        (["report", "empty"], "got no model"),
        (["report", "nowhere"], "got no model"),
        (["report", "{run}", "-o", "page.txt"], "page.txt"),
        (["report", "{run}", "-o", "page.html", "--data", "other"], "vertices"),
        (["report", "unknown", "-o", "page.html"], "--data"),
        (["report", "laters", "-o", "page.html"], "later release"),
        (["sample", "{run}", "-o", "run", "--n", "0"], "positive '--n'"),
        (["sample", "{run}", "-o", "run", "--seed", str(2**64)], "'--seed' below"),
        (["sample", "nowhere", "-o", "new.ply"], "a folder to write to (got new.ply)"),
        (["sample", "nowhere", "-o", "other/a.ply"], "a folder to write to"),
        (["sample", "later", "-o", "run"], "later release"),
        (["interpolate", "{run}", "other/a.ply", SHAPE[0], "-o", "run"], "vertices in other"),
        (["interpolate", "{run}", "nowhere.ply", SHAPE[0], "-o", "run"], "nowhere.ply"),
        (["interpolate", "{run}", "none.json", SHAPE[0], "-o", "run"], "Expected a file of JSON"),
        (["interpolate", "{run}", "short.json", SHAPE[0], "-o", "run"], "code of 8 numbers"),
        (["interpolate", "{run}", "bad.json", SHAPE[0], "-o", "run"], "bad.json"),
        (["interpolate", "{run}", *SHAPE[:2], "-o", "run", "--steps", "1"], "at least 2"),
        (
            ["interpolate", "nowhere", "a", "b", "-o", "walk.webm"],
            "a folder or a file ending in .gif or .mp4 to write to (got walk.webm)",
        ),
        (["interpolate", "later", *SHAPE[:2], "-o", "run"], "later release"),
        (["transfer", "{run}", *SHAPE[:2], "other/a.ply", "-o", "t.ply"], "vertices in other"),
        (["transfer", "{run}", *SHAPE[:2], "short.json", "-o", "t.ply"], "code of 8 numbers"),
        (["transfer", "nowhere", *SHAPE, "-o", "t.txt"], ".off or .stl to write to (got t.txt)"),
        (["transfer", "nowhere", *SHAPE, "-o", "t"], ".off or .stl to write to (got t)"),
        (["transfer", "later", *SHAPE, "-o", "t.ply"], "later release"),
        (["fit", "{linear}", "plane.ply", "-o", "f.ply"], "the model explains"),
        (["fit", "{run}", "empty", "-o", "f"], "empty"),
        (["fit", "{run}", "nowhere.ply", "-o", "f.ply"], "nowhere.ply"),
        (["fit", "nowhere", "other/a.ply", "-o", "f"], ".off or .stl to write to (got f)"),
        (["fit", "nowhere", "other", "-o", "f.ply"], "a folder to write to (got f.ply)"),
        (["fit", "{run}", "colours.xyz", "-o", "f.ply"], "unit normal"),
        (["fit", "{run}", "other/a.ply", "-o", "other/a.ply"], "another file"),
        (["fit", "{run}", "other", "-o", "other"], "another folder"),
        (["fit", "{run}", "other/a.ply", "-o", "f.ply", "--noise", "-1"], "noise"),
        (["fit", "{run}", "{scans}/0.ply", "-o", "f.ply", "--landmarks", "bad.json"], "bad.json"),
        (["fit", "{run}", "{scans}/0.ply", "-o", "f.ply", "--landmarks", "list.json"], "landmarks"),
        (["fit", "later", "{scans}/0.ply", "-o", "f.ply"], "later release"),
        (["edit", "nowhere", SHAPE[0], "-o", "e.txt"], ".off or .stl to write to (got e.txt)"),
        (["edit", "{run}", SHAPE[0], "-o", "e.ply"], "--to or --by"),
        (["edit", "{run}", SHAPE[0], "-o", "e.ply", "--by", "9999", "0", "0", "1"], "9999"),
        (["edit", "{run}", SHAPE[0], "-o", "e.ply", "--by", "-1", "0", "0", "1"], "-1"),
        (["edit", "{run}", "short.json", "-o", "e.ply", "--by", "1", "0", "0", "1"], "8 numbers"),
        (["edit", "{run}", "other/a.ply", "-o", "e.ply", "--by", "1", "0", "0", "1"], "vertices"),
        (["edit", "later", SHAPE[0], "-o", "e.ply", "--by", "1", "0", "0", "1"], "later release"),
        (["repair", "nowhere", "-o", "whole"], "nowhere"),
        (["repair", "empty", "-o", "whole"], "empty"),
        (["repair", "broken", "-o", "whole.ply"], "a folder to write to (got whole.ply)"),
        (["repair", "broken", "-o", "other"], "empty folder"),
        (["repair", "other/a.ply", "-o", "whole"], ".off or .stl to write to (got whole)"),
        (
            ["repair", "other/a.ply", "-o", "b.ply", "--merge", "0.1", "--no-stitch"],
            "--merge or --no-stitch",
        ),
    ],
)
def test_mistakes_are_one_line(command, line, run, linear, scans, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_mesh(tmp_path / "other" / "a.ply", *blob(2, seed=0))
    write_mesh(tmp_path / "plane.ply", *plane())
    (tmp_path / "broken").mkdir()
    for i in range(40):
        (tmp_path / "broken" / f"{i}.ply").write_text("no mesh")
    np.save(tmp_path / "m.npy", np.random.default_rng(0).normal(size=(40, 900, 3)))
    (tmp_path / "whole.onnx").mkdir()
    (tmp_path / "short.json").write_text("[0.5, 1]")
    (tmp_path / "bad.json").write_text("[0.5, ")
    (tmp_path / "list.json").write_text("[0.5, 1]")
    (tmp_path / "colours.xyz").write_text("0 1 2 255 255 255\n" * 4)
    later(run / "model", tmp_path / "later")
    later(run / "model", tmp_path / "laters" / "a" / "model")
    shutil.copytree(run / "model", tmp_path / "unknown" / "model")
    before = sorted(tmp_path.rglob("*"))
    assert main([part.format(run=run, linear=linear, scans=scans) for part in command]) == 1
    error = capsys.readouterr().err.split("\r")[-1]  # after a bar, where it took long
    assert error.startswith("pyg-attnpool: ") and line in error
    assert "Traceback" not in error and sorted(tmp_path.rglob("*")) == before


def plane():
    r"""Something of the size of the scans which no blob explains."""
    grid = np.stack(np.meshgrid(*[np.linspace(-200, 200, 30)] * 2), -1).reshape(-1, 2)
    return np.concatenate([grid, np.zeros((len(grid), 1))], axis=1), Delaunay(grid).simplices


def later(model, folder):
    r"""A model of a version that is still to come."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "version": 99}))


COMMANDS = {
    "train": ["train", "a"],
    "evaluate": ["evaluate", "a"],
    "info": ["info", "a", "--b"],
    "export": ["export", "a"],
    "view": ["view", "a", "--b"],
    "report": ["report"],
    "sample": ["sample", "a"],
    "interpolate": ["interpolate", "a", "b", "c", "-o", "d", "--steps", "many"],
    "transfer": ["transfer", "a", "b", "c", "-o", "d"],
    "fit": ["fit", "a", "b"],
    "edit": ["edit", "a", "b", "-o", "c", "--by", "1", "2"],
    "repair": ["repair", "a"],
}


def test_every_command_is_among_those_that_are_tested():
    app = importlib.import_module("pyg_attnpool.cli.app")
    assert set(COMMANDS) == {command.__name__ for command in app.COMMANDS}


@pytest.mark.parametrize("command", [["nothing"], [], *COMMANDS.values()])
def test_wrong_arguments_end_with_code_two(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 2 and capsys.readouterr().err


def test_repair_says_what_it_has_done(scans, tmp_path, capsys):
    vertices, faces = read_mesh(scans / "0.ply")
    lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()] + ["v 0 0 0"]
    lines += [f"f {a} {b} {c}" for a, b, c in [*(faces + 1).tolist(), [1, 1, 2]]]
    (tmp_path / "broken.obj").write_text("\n".join(lines) + "\n")
    out = tmp_path / "whole.obj"
    assert main(["repair", str(tmp_path / "broken.obj"), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 degenerate faces" in said and "1 vertices without a face" in said
    for found, wanted in zip(read_mesh(out), (vertices, faces), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert main(["repair", str(tmp_path / "none.obj"), "-o", str(out)]) == 1
    assert "none.obj" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_it_takes(command, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    (example,) = re.findall(rf"Example: pyg-attnpool ({command} .*)", shown)
    # A flag that is shown as --no-open says what it does, not what it takes away.
    for flag, text in re.findall(r"(--no-\w+) +(.*?\(default: \w+\))", shown, re.DOTALL):
        assert "Whether" not in text and "default: False" in text, flag
    # It fails at the model or data that are not there, not at its own arguments.
    assert main(example.split()) == 1 and "(got" in capsys.readouterr().err


def started(code, **kwargs):
    # A job in the background ignores Ctrl-C, and so would its children.
    heard = {} if os.name == "nt" else {"preexec_fn": hear_ctrl_c}
    command = [sys.executable, *code]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **heard, **kwargs)


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_the_command_line_is_imported_is_no_mistake(tmp_path):
    for content, code, said in (
        ("raise KeyboardInterrupt", 130, ""),
        ("raise ImportError('no tyro')", 1, 'pip install "pyg_attnpool[cli]"'),
    ):
        (tmp_path / "tyro.py").write_text(content)
        places = os.pathsep.join([str(tmp_path), *sys.path])
        process = started(
            ["-m", "pyg_attnpool.cli", "info", "faces"], env={**os.environ, "PYTHONPATH": places}
        )
        _, error = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in error
        assert said in error and error.count("\n") == bool(said)


def test_help_needs_no_torch():
    code = """
import sys
from pyg_attnpool.cli import main
for command in (["--help"], ["train", "--help"], ["train"]):
    try:
        main(command)
    except SystemExit:
        pass
heavy = {"torch", "torch_geometric", "scipy", "numpy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    process = started(["-c", code], stdout=subprocess.DEVNULL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole groups of processes")
def test_ctrl_c_leaves_whole_files_and_says_how_to_go_on(scans, tmp_path):
    run = tmp_path / "run"
    command = ["-m", "pyg_attnpool.cli", "train", str(scans), "-o", str(run), "--unit", "mm"]
    process = started([*command, "--steps", "5000"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "last.ckpt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error and "--resume goes on" in error.splitlines()[-1]
    checkpoint = load_checkpoint(run / "last.ckpt")
    assert checkpoint["epoch"] >= 0 and not (run / "model").exists()


@pytest.mark.slow
def test_output_that_nobody_reads_to_its_end_is_no_mistake(linear):
    process = started(
        ["-m", "pyg_attnpool.cli", "info", str(linear), "--json"], stdout=subprocess.PIPE
    )
    process.stdout.close()
    error = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert "Traceback" not in error and "Broken" not in error
