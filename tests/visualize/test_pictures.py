import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from pyg_attnpool.visualize import plot_mesh, plot_reconstructions  # noqa: E402

TRIANGLE = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
FRONT, BACK = np.array([[0, 1, 2]]), np.array([[0, 2, 1]])


def centre_colour(*args, **kwargs):
    r"""The colour in the middle of the first triangle."""
    figure = Figure(figsize=(2, 2))
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    plot_mesh(ax, *args, azimuth=0, **kwargs)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())
    return image[int(0.75 * image.shape[0]), int(0.25 * image.shape[1]), :3]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_values_are_colours_of_the_scale(value):
    got = centre_colour(TRIANGLE, FRONT, torch.full((3,), 2 + 3 * value), Normalize(2, 5))
    expected = np.array(matplotlib.colormaps["viridis"](value)[:3]) * 255
    np.testing.assert_allclose(got, expected, atol=1.5)


def test_what_looks_away_is_not_drawn():
    assert (centre_colour(TRIANGLE, FRONT) < 250).any()
    assert (centre_colour(TRIANGLE, BACK) == 255).all()


def test_the_nearer_face_hides_the_farther():
    vertices = torch.cat([TRIANGLE, TRIANGLE + torch.tensor([0, 0, 1.0])])
    values = torch.tensor([0.0, 0, 0, 1, 1, 1])
    for faces in (np.array([[0, 1, 2], [3, 4, 5]]), np.array([[3, 4, 5], [0, 1, 2]])):
        got = centre_colour(vertices, faces, values, Normalize(0, 1))
        np.testing.assert_allclose(got, np.array(matplotlib.colormaps["viridis"](1.0)[:3]) * 255, 2)


def test_errors_are_in_millimetres_and_one_scale(tmp_path, monkeypatch):
    drawn = []
    draw = plot_mesh

    def record(ax, vertices, faces, values=None, norm=None, azimuth=20.0):
        if values is not None:
            drawn.append((values, norm))
        draw(ax, vertices, faces, values, norm, azimuth)

    monkeypatch.setattr("pyg_attnpool.visualize.pictures.plot_mesh", record)
    truth = TRIANGLE.expand(2, 3, 3)
    shift = torch.tensor([0.003, 0, 0.004])
    path = tmp_path / "picture.png"
    plot_reconstructions(path, FRONT, truth, {"near": truth + shift / 10, "far": truth + shift})
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    for (values, norm), expected in zip(drawn, [0.5, 5, 0.5, 5], strict=True):
        torch.testing.assert_close(values, torch.full((3,), float(expected)), atol=1e-3, rtol=1e-3)
        assert norm is drawn[0][1]
        assert norm.vmin == 0 and norm.vmax == pytest.approx(5, rel=1e-3)
