import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pyg_attnpool.visualize
from pyg_attnpool import MeshHierarchy
from pyg_attnpool.models import MeshAutoencoder, MorphableModel
from pyg_attnpool.models.plan import run_plan
from pyg_attnpool.visualize import read_viewer
from tests.mesh.meshes import blob
from tests.visualize.browser import opened

WEB = Path(pyg_attnpool.visualize.__file__).parent / "web"
CHANNELS = dict(channels=(4, 6), decoder_channels=(6, 5, 7))


@pytest.fixture(scope="module")
def meshes():
    r"""Faces and thirty deformations of one template, in metres."""
    torch.manual_seed(0)
    vertices, faces = blob(3, seed=0, hole=True)
    vertices = torch.from_numpy(0.1 * vertices).float()
    modes = torch.sin(20 * vertices @ torch.randn(3, 24)).view(len(vertices), 3, 8)
    x = vertices + 0.003 * torch.einsum("ncl,ml->mnc", modes, torch.randn(30, 8))
    return x, faces


@pytest.fixture(scope="module")
def models(meshes):
    x, faces = meshes
    torch.manual_seed(1)
    hierarchy = MeshHierarchy.from_template((x[0].numpy(), faces), factors=[4, 4])
    models = {
        "pca": MorphableModel.pca(hierarchy, 4, "mm").fit(x),
        "coma": MorphableModel.coma(hierarchy, 4, unit="mm", **CHANNELS),
        "neural3dmm": MorphableModel.neural3dmm(hierarchy, 4, unit="cm", hops=2, **CHANNELS),
        "wide": MorphableModel(
            # Convolutions that narrow and that widen, and features that fill no whole vector.
            MeshAutoencoder(
                hierarchy, channels=(4, 9), decoder_channels=(9, 3, 18), latent_channels=4
            ),
        ),
    }
    for name, model in models.items():
        if name != "pca":
            with torch.no_grad():
                model.autoencoder.from_latent.weight *= 20  # codes that can be told apart
            model.set_statistics(x.mean(dim=0), x.std(dim=0))
            model.set_latent_statistics(x)
    models["modal"] = MorphableModel.modal(hierarchy, 4, modes=9, hidden_channels=10)
    models["modal"].set_statistics(x.mean(dim=0), x.std() + 0 * x[0])
    models["modal"].autoencoder.fit_modes(lambda: [models["modal"].standardize(x)])
    torch.nn.init.normal_(models["modal"].autoencoder.from_code[-1].weight)  # bent
    models["modal"].set_latent_statistics(x)
    return models


def size(model):
    return np.linalg.norm(np.ptp(model.template.numpy(), axis=0))


def some_codes(model):
    return model.latent_mean + model.latent_std * torch.randn(5, model.latent_channels)


@torch.no_grad()
def check_vertices(model, codes, vertices):
    expected = model.decode(torch.as_tensor(codes)).numpy()
    # Not a constant that a dead activation leaves.
    assert len(codes) == 1 or expected.std(axis=0).max() > 1e-3 * size(model)
    assert np.abs(np.asarray(vertices) - expected).max() < 1e-4 * size(model)


NAMES = ["pca", "coma", "neural3dmm", "wide", "modal"]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_page_holds_decodes_as_the_model_does(tmp_path, models, name):
    model, path = models[name], tmp_path / "page.html"
    difference = model.export(path)
    assert 0 < difference < 1e-4
    content = read_viewer(path.read_text("utf-8"))
    codes = some_codes(model)
    check_vertices(model, codes, run_plan(content["plan"], codes.numpy()))
    np.testing.assert_array_equal(content["faces"], model.faces)
    np.testing.assert_allclose(content["latent"]["std"], model.latent_std, rtol=1e-6)
    # The root of the covariance, which random meshes are drawn with.
    factor = np.array(content["latent"]["factor"])
    np.testing.assert_allclose(factor @ factor.T, model.latent_cov, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_alone_in_node(tmp_path, models, name):
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node, to run the page's decoder without a browser")
    model = models[name]
    model.export(tmp_path / "page.html")
    codes = some_codes(model)
    command = [node, Path(__file__).with_name("decode.mjs"), WEB, tmp_path / "page.html"]
    done = subprocess.run(
        command, input=json.dumps(codes.tolist()), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    check_vertices(model, codes, json.loads(done.stdout))


def test_weights_of_a_wide_range_are_stored_as_floats(tmp_path, models):
    x, model = models["pca"].template.expand(8, -1, -1), models["coma"]
    model = MorphableModel.coma(model.hierarchy, 4, **CHANNELS)
    model.set_statistics(x.mean(dim=0), torch.full_like(model.std, 0.01))
    with torch.no_grad():
        # One weight that a step of 1 / 32767 of the largest would spoil all others beside.
        model.autoencoder.from_latent.weight[0, 0] = 1e5
        model.latent_cov[0] *= 0
        model.latent_cov[:, 0] *= 0
    assert model.export(tmp_path / "page.html") < 1e-4
    content = read_viewer((tmp_path / "page.html").read_text("utf-8"))
    assert content["plan"][0].weight.dtype == np.float32


def test_stored_meshes_come_back_with_their_errors(tmp_path, meshes, models):
    x, model = meshes[0][:3], models["pca"]
    model.export(tmp_path / "page.html", meshes=x, names=["one", "two", "three"])
    content = read_viewer((tmp_path / "page.html").read_text("utf-8"))
    mean, *stored = content["meshes"]
    assert [m["name"] for m in content["meshes"]] == ["Mean", "one", "two", "three"]
    np.testing.assert_allclose(mean["code"], model.latent_mean, atol=1e-7)
    for mesh, truth in zip(stored, x.numpy(), strict=True):
        decoded = run_plan(content["plan"], np.array([mesh["code"]]))[0]
        np.testing.assert_allclose(decoded + mesh["residual"], truth, atol=1e-4 * size(model))
        assert np.abs(mesh["residual"]).max() > 1e-5  # an error that the page has to show


def test_names_are_text_wherever_they_stand(tmp_path, meshes, models):
    bad = "</script><script>alert(1)</script><!--"
    path = tmp_path / "page.html"
    models["pca"].export(path, meshes=meshes[0][:1], names=[bad], title=bad)
    page = path.read_text("utf-8")
    assert bad not in page
    content = read_viewer(page)
    assert content["title"] == bad and content["meshes"][1]["name"] == bad


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        (dict(names=["a"]), r"Expected 0 'names'.*got 1"),
        (dict(meshes=torch.zeros(2, 5, 3)), r"got \[2, 5, 3\]|Expected 'meshes'|meshes"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, models, kwargs, error):
    with pytest.raises(ValueError, match=error):
        models["pca"].export(tmp_path / "page.html", **kwargs)
    assert not list(tmp_path.iterdir())


def test_a_model_that_the_page_cannot_run_is_refused(tmp_path, models):
    hierarchy = models["coma"].hierarchy
    network = MeshAutoencoder(hierarchy, conv="GCNConv", latent_channels=3, **CHANNELS)
    model = MorphableModel(network, hierarchy)
    with pytest.raises(ValueError, match="Expected .* spiral convolutions .got GraphConv"):
        model.export(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_kernels_that_node_is_tested_with():
    kernels = base64.b64encode((WEB / "src" / "kernels.wasm").read_bytes()).decode()
    assert kernels in (WEB / "viewer.html").read_text("utf-8")


def test_only_pages_are_read():
    with pytest.raises(ValueError, match="Expected a page of pyg_attnpool"):
        read_viewer("<html></html>")


def test_pages_need_the_core_alone(tmp_path, models):
    models["pca"].save(tmp_path / "model")
    code = """if True:
        import sys
        for name in ("matplotlib", "openmesh", "plotly", "PIL", "torch_sparse"):
            sys.modules[name] = None
        from pyg_attnpool import MorphableModel
        MorphableModel.load("model").export("page.html")
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)
    assert (tmp_path / "page.html").stat().st_size < 4e6


# In a browser #########################################################################


def shown(page):
    r"""Code and vertices of the page."""
    page.wait_for_function("!viewer.waiting")
    code, position = page.evaluate("[[...viewer.code], [...viewer.stage.position]]")
    return torch.tensor([code]), np.array(position).reshape(1, -1, 3)


@pytest.mark.parametrize("name", NAMES)
def test_sliders_move_the_mesh_as_python_does(browser, tmp_path, models, name):
    model = models[name]
    model.export(tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        code, vertices = shown(page)
        np.testing.assert_allclose(code[0], model.latent_mean, rtol=1e-6, atol=1e-6)
        check_vertices(model, code, vertices)
        sliders = page.locator(".slider input")
        assert sliders.count() == model.latent_channels
        for i, value in enumerate((2.5, -1.25, 3, -3)):
            sliders.nth(i).fill(str(value))
        code, vertices = shown(page)
        order = page.evaluate("viewer.order")
        expected = model.latent_mean.clone()
        expected[order] += torch.tensor([2.5, -1.25, 3, -3]) * model.latent_std[order]
        torch.testing.assert_close(code[0], expected, rtol=1e-5, atol=1e-6)
        check_vertices(model, code, vertices)
        page.locator(".slider output").first.get_by_text("+2.5 σ").wait_for()
        sliders.first.press("ArrowRight")
        moved, vertices = shown(page)
        assert moved[0, order[0]] > code[0, order[0]]
        check_vertices(model, moved, vertices)
        page.get_by_role("button", name="Random").click()
        random, vertices = shown(page)
        assert (random - model.latent_mean).abs().max() > 0
        check_vertices(model, random, vertices)
        page.get_by_role("button", name="Reset").click()
        np.testing.assert_allclose(shown(page)[0][0], model.latent_mean, rtol=1e-6, atol=1e-6)


def test_between_stored_meshes(browser, tmp_path, meshes, models):
    x, model = meshes[0][:2], models["pca"]
    model.export(tmp_path / "page.html", meshes=x, names=["one", "two"])
    with torch.no_grad():
        one, two = model.encode(x)
        errors = 1000 * (model(x) - x).norm(dim=-1)
    with opened(browser, tmp_path / "page.html") as page:
        page.locator("#from").select_option("one")
        page.locator("#to").select_option("two")
        between = page.get_by_label("Between the two meshes")
        for t in (0, 0.25, 1):
            between.fill(str(t))
            code, vertices = shown(page)
            torch.testing.assert_close(code[0], one + t * (two - one), rtol=1e-4, atol=1e-5)
            check_vertices(model, code, vertices)
        page.locator("[value=error]").check()
        page.get_by_text("Distance from two").wait_for()
        note = page.locator("#colour-note").text_content()
        mean, largest = (float(v) for v in re.findall(r"(\d+\.\d+) mm", note))
        assert mean == pytest.approx(errors[1].mean().item(), abs=0.011)
        assert largest == pytest.approx(errors[1].max().item(), abs=0.011)

        page.get_by_role("button", name="Play").click()
        page.wait_for_function("Number(document.getElementById('between').value) < 0.9")
        page.get_by_role("button", name="Pause").click()
        before = page.evaluate("[...viewer.code]")
        page.wait_for_timeout(100)
        assert page.evaluate("[...viewer.code]") == before

        page.get_by_role("button", name="Keep this mesh").click()
        page.locator("#from").select_option("Kept 1")
        np.testing.assert_allclose(shown(page)[0][0], before, rtol=1e-6)


@pytest.mark.parametrize("ending", ["OBJ", "PLY"])
def test_files_are_in_the_unit_of_the_model(browser, tmp_path, models, ending):
    from pyg_attnpool.mesh import read_mesh

    model = models["neural3dmm"]
    model.export(tmp_path / "page.html", title="My faces")
    with opened(browser, tmp_path / "page.html") as page:
        page.keyboard.press("r")
        _, vertices = shown(page)
        with page.expect_download() as download:
            page.get_by_role("button", name=ending).click()
        name = download.value.suggested_filename
        assert name == f"My_faces.{ending.lower()}"
        download.value.save_as(tmp_path / name)
    found, faces = read_mesh(tmp_path / name)
    np.testing.assert_allclose(found, 100 * vertices[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(faces, model.faces)


def test_keys(browser, tmp_path, models):
    model = models["pca"]
    model.export(tmp_path / "page.html")
    camera = "viewer.stage.camera.position.toArray()"
    with opened(browser, tmp_path / "page.html") as page:
        front = page.evaluate(camera)
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("+")
        assert np.abs(np.subtract(page.evaluate(camera), front)).max() > 0.01
        page.keyboard.press("v")
        np.testing.assert_allclose(page.evaluate(camera), front, atol=1e-6)
        page.keyboard.press("c")
        assert page.evaluate("viewer.mode") == "displacement"
        page.keyboard.press("c")  # there is no error where no mesh is stored
        assert page.evaluate("viewer.mode") == "plain"
        page.keyboard.press("?")
        heading = page.get_by_role("heading", name="How to use this page")
        heading.wait_for()
        page.keyboard.press("Escape")
        heading.wait_for(state="hidden")
        page.wait_for_function("document.activeElement === document.body")
        page.keyboard.press(" ")
        page.wait_for_function("viewer.playing")


def test_fingers(browser, tmp_path, models):
    model = models["pca"]
    model.export(tmp_path / "page.html")
    phone = dict(viewport=dict(width=390, height=844), is_mobile=True, has_touch=True)
    with opened(browser, tmp_path / "page.html", **phone) as page:
        session = page.context.new_cdp_session(page)

        def move(*fingers):
            # Every finger goes from one point to another.
            for t in (0, 0.25, 0.5, 0.75, 1):
                points = [np.add(a, t * np.subtract(b, a)).tolist() for a, b in fingers]
                points = [{"id": i, "x": x, "y": y} for i, (x, y) in enumerate(points)]
                event = {"type": "touchMove" if t else "touchStart", "touchPoints": points}
                session.send("Input.dispatchTouchEvent", event)
            session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

        def camera():
            # Angle around the mesh, height above it, distance.
            page.wait_for_function("!viewer.stage.due")
            position, target = page.evaluate(
                "[viewer.stage.camera.position, viewer.stage.controls.target].map(v => [...v])"
            )
            x, y, z = np.subtract(position, target)
            return np.arctan2(x, z), y, np.hypot(np.hypot(x, y), z)

        height = page.locator("#canvas").bounding_box()["height"]
        angle, above, far = camera()
        move([(200, 250), (120, 250)])  # the height of the canvas is one turn
        angle += 2 * np.pi * 80 / height
        np.testing.assert_allclose(camera(), (angle, above, far), rtol=1e-2)
        move([(200, 200), (200, 280)])
        tilted = camera()
        assert tilted[1] > 2 * above and tilted[2] == pytest.approx(far)
        move([(170, 250), (140, 250)], [(230, 250), (260, 250)])
        np.testing.assert_allclose(camera(), (angle, tilted[1] / 2, far / 2), rtol=1e-2)
        # The page itself has neither scrolled nor been magnified.
        assert page.evaluate("[scrollY, visualViewport.scale]") == [0, 1]

        slider = page.locator(".slider input").first
        box = slider.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        move([(x, y), (x + box["width"] / 4, y)])
        code, vertices = shown(page)
        assert float(slider.input_value()) == pytest.approx(1.5, abs=0.2)
        check_vertices(model, code, vertices)
        assert (code[0] - model.latent_mean).abs().max() > 0
        # Along the slider a finger sets it, across it scrolls to the controls further down.
        move([(x, y), (x, y - 200)])
        page.wait_for_function("scrollY > 100")
        assert torch.equal(shown(page)[0], code)


@pytest.mark.parametrize("viewport", [(1200, 800), (390, 844)], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_wide_and_narrow(browser, tmp_path, models, scheme, viewport):
    image = pytest.importorskip("PIL.Image", reason="needs pillow, to look at the picture")
    models["pca"].export(tmp_path / "page.html")
    width, height = viewport
    view = dict(viewport=dict(width=width, height=height), color_scheme=scheme)
    with opened(browser, tmp_path / "page.html", **view) as page:
        page.wait_for_timeout(100)
        page.screenshot(path=tmp_path / "page.png")
        # Nothing has to be scrolled sideways.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#canvas").bounding_box()
        # The icons are read in front of the mesh too: W3C asks for a contrast of 3.
        page.evaluate("viewer.stage.zoom(0.3)")
        page.wait_for_function("!viewer.stage.due")
        page.locator("#help").screenshot(path=tmp_path / "icon.png")
        page.keyboard.press("d")
        other = page.evaluate("document.documentElement.dataset.theme")
    assert other == {"light": "dark", "dark": "light"}[scheme]
    pixels = np.asarray(image.open(tmp_path / "page.png").convert("RGB")).astype(float)
    corner = pixels[int(box["y"]) + 5, int(box["x"]) + 5]
    assert (corner.mean() > 128) == (scheme == "light")
    values = np.asarray(image.open(tmp_path / "icon.png").convert("L")) / 255
    low, high = np.quantile(values**2.2, (0.02, 0.98))
    assert (high + 0.05) / (low + 0.05) > 3
    # The mesh stands in the middle of its stage.
    x, y = int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2)
    assert np.abs(pixels[y - 40 : y + 40, x - 40 : x + 40] - corner).max() > 40
