import csv
import html
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from pyg_attnpool import MeshHierarchy
from pyg_attnpool.datasets import MeshDataset
from pyg_attnpool.models import MorphableModel
from pyg_attnpool.visualize import find_models, write_report
from pyg_attnpool.visualize.charts import INK, LINE, QUIET, lines
from pyg_attnpool.visualize.page import read_page
from pyg_attnpool.visualize.report import read_curve
from tests.mesh.meshes import blob, icosphere
from tests.visualize.browser import opened

pytest.importorskip("matplotlib")
pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def meshes():
    r"""A data set of 30 deformations of one template, in metres, with names."""
    torch.manual_seed(0)
    vertices, faces = blob(3, seed=0, hole=True)
    vertices = torch.from_numpy(0.1 * vertices).float()
    modes = torch.sin(20 * vertices @ torch.randn(3, 24)).view(len(vertices), 3, 8)
    x = vertices + 0.003 * torch.einsum("ncl,ml->mnc", modes, torch.randn(30, 8))
    names = [f"face {i}" for i in range(29)] + ["<b>&"]
    return MeshDataset(x, (x[0].double().numpy(), faces), {"name": names})


@pytest.fixture(scope="module")
def models(meshes):
    torch.manual_seed(1)
    hierarchy = MeshHierarchy.from_template(meshes.template, factors=[4, 4])
    x = meshes.vertices
    channels = dict(channels=(4, 6), decoder_channels=(6, 5, 7))
    models = {"PCA": MorphableModel.pca(hierarchy, 4, "mm").fit(x)}
    for pool in ("qem", "attention"):
        model = MorphableModel.coma(hierarchy, 4, pool, "mm", **channels)
        model.set_statistics(x.mean(dim=0), x.std(dim=0))
        model.set_latent_statistics(x)
        models[pool] = model
    return models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    r"""Logs of a training that was cut off after two epochs and went on."""
    folder = tmp_path_factory.mktemp("run") / "qem"
    rows = {
        "version_0": [(0, 3.5, ""), (0, "", 0.9), (1, 3.0, ""), (1, "", 0.8), (2, 9.0, "")],
        "version_10": [(3, 2.0, 0.5)],
        "version_2": [(2, 2.5, ""), (2, "", 0.7), (3, 8.0, "")],
    }
    for name, values in rows.items():
        (folder / "log" / name).mkdir(parents=True)
        with open(folder / "log" / name / "metrics.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", "step", "val_mm", "train_loss"])
            writer.writerows([epoch, 7 * epoch, *value] for epoch, *value in values)
    return {"qem": folder}


@pytest.fixture(scope="module")
def page(models, meshes, folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, models, meshes, folders, "Faces & more")
    return path


@torch.no_grad()
def distances(model, meshes):
    return (1000 * (model(meshes.vertices) - meshes.vertices).norm(dim=-1)).double().numpy()


def table(text, title):
    r"""The cells of the table of a section, as text."""
    section = text[text.index(f"<h2>{title}</h2>") :]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", section[: section.index("</table>")], re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in cells]


def test_a_curve_goes_on_where_its_training_went_on(folders):
    curve = read_curve(folders["qem"])
    assert curve["val_mm"] == [(0, 3.5), (1, 3.0), (2, 2.5), (3, 2.0)]
    assert curve["train_loss"] == [(0, 0.9), (1, 0.8), (2, 0.7), (3, 0.5)]
    assert read_curve(folders["qem"] / "log") == {}


def test_the_table_has_the_errors(page, models, meshes):
    header, *rows = table(page.read_text("utf-8"), "Errors")
    assert header[1:6] == ["mean", "std", "median", "95 %", "worst mesh"]
    for (name, model), row in zip(models.items(), rows, strict=True):
        d = distances(model, meshes)
        expected = [d.mean(), d.std(), np.median(d), np.quantile(d, 0.95), d.mean(axis=1).max()]
        assert row[0] == name
        np.testing.assert_allclose([float(cell) for cell in row[1:6]], expected, atol=2e-3)


def test_the_worst_meshes_are_those_of_the_best_model(page, models, meshes):
    means = {name: distances(model, meshes).mean(axis=1) for name, model in models.items()}
    best = min(means, key=lambda name: means[name].mean())
    order = means[best].argsort()[::-1][:5]
    header, *rows = table(page.read_text("utf-8"), "Worst meshes")
    assert header == ["mesh", *models]
    assert [row[0] for row in rows] == [meshes.name[i] for i in order]
    for row, i in zip(rows, order, strict=True):
        expected = [means[name][i] for name in models]
        np.testing.assert_allclose([float(cell) for cell in row[1:]], expected, atol=1e-3)


def test_meshes_that_turn_are_those_of_the_models(page, models, meshes):
    content = read_page(page.read_text("utf-8"))
    np.testing.assert_array_equal(content["faces"], next(iter(models.values())).faces)
    assert [model["name"] for model in content["models"]] == list(models)
    shown = [mesh["index"] for mesh in content["meshes"]]
    assert {0, 29} <= set(shown) and len(set(shown)) == len(shown)
    for mesh in content["meshes"]:
        assert mesh["name"] == meshes.name[mesh["index"]]
        truth = meshes.vertices[mesh["index"]]
        # A step of the stored integers is a 30,000th of the size of the template.
        np.testing.assert_allclose(mesh["vertices"], truth, atol=1e-5)
        for model, part, mean in zip(
            models.values(), mesh["residuals"], mesh["means"], strict=True
        ):
            with torch.no_grad():
                expected = model(truth.unsqueeze(0))[0] - truth
            np.testing.assert_allclose(part["residual"], expected, atol=1e-5)
            assert mean == pytest.approx(1000 * expected.norm(dim=-1).mean().item(), rel=1e-4)


def test_mappings_of_learned_aggregation_sharpen(page, models):
    _, *rows = table(page.read_text("utf-8"), "Mappings between levels")
    # Two down and two up of each of the networks; the start 3 P - 2 A takes 2 of 5 below zero.
    assert len(rows) == 8
    for row in rows:
        below = float(row[4].rstrip(" %"))
        assert below == (0 if row[0].startswith("qem") else pytest.approx(40, abs=1))


def test_settings_and_versions(page, models):
    header, *rows = table(page.read_text("utf-8"), "Settings")
    assert header == ["setting", *models]
    rows = {row[0]: row[1:] for row in rows}
    assert rows["type"] == ["PCA", "MeshAutoencoder", "MeshAutoencoder"]
    assert rows["down"] == ["", "qem", "attention"]
    assert f"torch {torch.__version__}" in page.read_text("utf-8")


def test_charts_take_the_colours_of_the_page():
    text = lines({"a & b": ([1, 2], [3.0, 4.0])}, "epoch", "<error>", {"a & b": "#123456"})
    ElementTree.fromstring(text)  # well formed
    assert "currentColor" in text or "var(--quiet)" in text
    assert not any(color in text for color in (INK, QUIET, LINE)) and "#123456" in text


def test_text_is_text_wherever_it_stands(page):
    text = page.read_text("utf-8")
    assert "<b>&" not in text and "<title>Faces &amp; more</title>" in text
    ids = re.findall(r'\sid="([^"]+)"', text[: text.index('<script type="application/json"')])
    assert len(set(ids)) == len(ids)


def test_a_report_repeats_to_the_byte(page, models, meshes, folders, tmp_path):
    write_report(tmp_path / "again.html", models, meshes, folders, "Faces & more")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_a_large_template_makes_no_large_page(tmp_path):
    vertices, faces = icosphere(5)
    x = torch.from_numpy(vertices).float() + 0.01 * torch.randn(12, len(vertices), 3)
    model = MorphableModel.pca((vertices, faces), 4).fit(x[:6])
    models = {f"model {i}": model for i in range(6)}
    write_report(tmp_path / "report.html", models, x)
    assert (tmp_path / "report.html").stat().st_size < 4e6


def test_models_of_a_run_are_found(tmp_path, models):
    models["PCA"].save(tmp_path / "a" / "model")
    models["PCA"].save(tmp_path / "b" / "model")
    assert find_models(tmp_path) == {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert find_models(tmp_path / "a") == {"a": tmp_path / "a"}
    for empty in (tmp_path / "a" / "model", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="got no model"):
            find_models(empty)


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, models, meshes):
    other = MorphableModel.pca(blob(2, seed=0), 2)
    for chosen, test, error in (
        ({}, meshes, "at least one model"),
        ({"a": models["PCA"], "b": other}, meshes, "of one template"),
        ({"a": models["PCA"]}, torch.zeros(2, 5, 3), "meshes"),
    ):
        with pytest.raises(ValueError, match=error):
            write_report(tmp_path / "report.html", chosen, test)
    assert not list(tmp_path.iterdir())


# In a browser #########################################################################


def test_meshes_are_shown_and_turn_together(browser, page, models, meshes):
    positions = "report.stages.map(({ stage }) => [...stage.position])"
    with opened(browser, page, viewport=dict(width=1200, height=900)) as view:
        name = view.locator("[data-show]").first.text_content()
        view.locator("[data-show]").first.click()
        assert view.locator("#maps select option:checked").text_content() == name
        truth = meshes.vertices[meshes.name.index(name)]
        found = np.array(view.evaluate(positions)).reshape(1 + len(models), -1, 3)
        np.testing.assert_allclose(found[0], truth, atol=1e-5)
        captions = view.locator("#stages figcaption span").all_text_contents()
        for i, model in enumerate(models.values()):
            with torch.no_grad():
                expected = model(truth.unsqueeze(0))[0]
            np.testing.assert_allclose(found[i + 1], expected, atol=2e-5)
            mean = 1000 * (expected - truth).norm(dim=-1).mean().item()
            assert captions[i + 1] == f"{mean:.2f} mm"

        cameras = "report.stages.map(({ stage }) => stage.camera.position.toArray())"
        before = np.array(view.evaluate(cameras))
        box = view.locator("canvas").nth(1).bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        view.mouse.move(x, y)
        view.mouse.down()
        view.mouse.move(x + 60, y + 10)
        view.mouse.up()
        view.wait_for_timeout(50)
        after = np.array(view.evaluate(cameras))
        assert np.abs(after - before).max() > 1e-3
        np.testing.assert_allclose(after, after[:1].repeat(len(after), 0), atol=1e-9)
        # The wheel scrolls the page instead.
        view.mouse.wheel(0, 200)
        view.wait_for_timeout(100)
        np.testing.assert_allclose(view.evaluate(cameras), after, atol=1e-9)

        legend = view.locator("#legend")
        assert legend.is_visible()
        view.locator("[value=shape]").check()
        assert legend.is_hidden()


@pytest.mark.parametrize("viewport", [(1200, 800), (390, 844)], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_wide_and_narrow(browser, page, scheme, viewport, tmp_path):
    from PIL import Image

    width, height = viewport
    kwargs = dict(viewport=dict(width=width, height=height), color_scheme=scheme)
    with opened(browser, page, **kwargs) as view:
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        view.screenshot(path=tmp_path / "page.png", full_page=True)
        view.locator("#stages canvas").first.scroll_into_view_if_needed()
        view.wait_for_timeout(100)
        view.locator("#stages canvas").first.screenshot(path=tmp_path / "mesh.png")
        view.keyboard.press("d")
        other = view.evaluate("document.documentElement.dataset.theme")
    assert other == {"light": "dark", "dark": "light"}[scheme]
    corner = np.asarray(Image.open(tmp_path / "page.png").convert("L"))[2, 2]
    assert (corner > 128) == (scheme == "light")
    pixels = np.asarray(Image.open(tmp_path / "mesh.png").convert("RGB")).astype(float)
    y, x = (n // 2 for n in pixels.shape[:2])
    assert np.abs(pixels[y - 10 : y + 10, x - 10 : x + 10] - pixels[3, 3]).max() > 40
