import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.tri import Triangulation  # noqa: E402

from pyg_attnpool.visualize import (  # noqa: E402
    draw_meshes,
    plot_mesh,
    plot_reconstructions,
    render,
    turntable,
    view_box,
    write_animation,
    write_picture,
)
from pyg_attnpool.visualize.pictures import AMBIENT, LIGHTS, SKIN  # noqa: E402
from tests.mesh.meshes import icosphere  # noqa: E402

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


def test_both_sides_are_drawn_in_the_same_light():
    front = centre_colour(TRIANGLE, FRONT)
    np.testing.assert_allclose(front, np.array(SKIN) * 255, atol=1.5)
    np.testing.assert_array_equal(centre_colour(TRIANGLE, BACK), front)


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


RED, GREEN = (1.0, 0, 0), (0, 1.0, 0)


def test_where_surfaces_cross_the_nearer_is_seen_at_every_pixel():
    # z = x / 2 and z = y / 2 cross on the diagonal, where no order of whole faces is right.
    square = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    one, two = (np.column_stack([square, square[:, axis] / 2]) for axis in (0, 1))
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    colors = np.repeat([RED, GREEN], 4, axis=0)
    image = render(
        np.concatenate([one, two]),
        np.concatenate([faces, faces + 4]),
        colors,
        size=(50, 40),
        azimuth=0,
        box=(np.zeros(3), 1.6),
        shade=0,
        samples=1,
    )
    x, y = np.meshgrid((np.arange(50) + 0.5 - 25) / 25, -(np.arange(40) + 0.5 - 20) / 25)
    expected = np.where((x > y)[..., None], RED, GREEN) * 255
    unequal = np.abs(x - y) > 1e-9
    np.testing.assert_array_equal(image[unequal][:, :3], expected[unequal])
    assert (image[..., 3] == 255).all()


def test_a_sphere_is_round_and_smoothly_lit():
    vertices, faces = icosphere(4)
    box = (np.zeros(3), 2.4)
    image = render(vertices, faces, size=(120, 120), azimuth=0, box=box, samples=1)
    at = (np.arange(120) + 0.5 - 60) / 50
    x, y = np.meshgrid(at, -at)
    radius = np.hypot(x, y)
    np.testing.assert_array_equal(image[radius > 1.01, 3], 0)
    np.testing.assert_array_equal(image[radius < 0.98, 3], 255)
    inside = radius < 0.95
    normal = np.stack([x, y, np.sqrt(np.clip(1 - radius**2, 0, None))], axis=-1)[inside]

    def light(normal):
        directions = [np.array(d) / np.linalg.norm(d) for d, _ in LIGHTS]
        shares = [s for _, s in LIGHTS]
        return AMBIENT + sum(
            s * np.maximum(normal @ d, 0) for d, s in zip(directions, shares, strict=True)
        )

    shade = light(normal) / light(np.array([0.0, 0, 1]))
    expected = np.clip(shade[:, None] * SKIN, 0, 1) * 255
    np.testing.assert_allclose(image[inside][:, :3], expected, atol=4)


def test_no_pixel_is_lost_between_faces():
    rng = np.random.default_rng(0)
    vertices = np.column_stack([rng.uniform(-1, 1, (300, 2)), np.zeros(300)])
    faces = Triangulation(vertices[:, 0], vertices[:, 1]).triangles
    image = render(vertices, faces, size=(90, 90), azimuth=0, box=(np.zeros(3), 1.6), samples=1)
    assert (image[..., 3] == 255).all()


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (20, 0), (130, 35), (-70, -20)])
def test_a_view_holds_the_whole_mesh_in_any_unit(azimuth, elevation):
    vertices, faces = icosphere(2)
    vertices = vertices * [1.0, 2.5, 0.4] + [3.0, -7, 2]
    view = dict(azimuth=azimuth, elevation=elevation, size=(60, 80))
    image = render(vertices, faces, **view)
    seen = image[..., 3] > 0
    assert not (seen[0].any() or seen[-1].any() or seen[:, 0].any() or seen[:, -1].any())
    assert seen.any(axis=1).sum() > 70 or seen.any(axis=0).sum() > 52
    difference = render(1000 * vertices, faces, **view).astype(int) - image
    assert (np.abs(difference).max(axis=-1) > 1).mean() < 0.002  # rounding at edges


def test_a_view_from_behind_is_that_of_the_turned_mesh():
    vertices, faces = icosphere(2)
    vertices = vertices * [1.0, 0.7, 0.5] + 0.2 * vertices[:, ::-1] ** 2
    turned = vertices * [-1, 1, -1]
    box = (np.zeros(3), 3.0)
    one = render(vertices, faces, size=(60, 60), azimuth=180, box=box)
    two = render(turned, faces, size=(60, 60), azimuth=0, box=box)
    assert np.abs(one.astype(int) - two).mean() < 0.05


def test_animations(tmp_path):
    from PIL import Image

    vertices, faces = icosphere(1)
    vertices = vertices * [1.0, 0.6, 0.3]
    frames = turntable(vertices, faces, num_frames=4, size=(40, 30))
    assert [f.shape for f in frames] == [(30, 40, 4)] * 4
    widths = [(f[..., 3] > 0).any(axis=0).sum() for f in frames]
    assert widths[0] == pytest.approx(widths[2], abs=1) and widths[0] > widths[1] + 5
    write_animation(tmp_path / "turn.gif", frames, fps=10)
    with Image.open(tmp_path / "turn.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (40, 30) and gif.info["duration"] == 100
        for i, frame in enumerate(frames):
            gif.seek(i)
            found = np.asarray(gif.convert("RGB")).astype(int)
            opaque = frame[..., 3] == 255
            assert np.abs(found[opaque] - frame[opaque][:, :3]).mean() < 12
            assert (found[frame[..., 3] == 0] == 255).all()


# imageio-ffmpeg leaves its pipes to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_film_has_its_frames(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg, to write MP4")
    vertices, faces = icosphere(1)
    path = tmp_path / "film.mp4"
    grown = [vertices * scale for scale in np.linspace(0.5, 1, 6)]
    write_animation(path, draw_meshes(grown, faces, size=(65, 49)), fps=5)
    reader = ffmpeg.read_frames(path)
    meta = next(reader)
    assert meta["size"] == (64, 48) and meta["fps"] == 5
    films = [np.frombuffer(frame, np.uint8).reshape(48, 64, 3) for frame in reader]
    areas = [(film.min(axis=-1) < 200).sum() for film in films]
    assert len(areas) == 6 and (np.diff(areas) > 0).all()


def test_pictures_of_an_interpolation_have_one_scale():
    vertices, faces = icosphere(1)
    small, large = draw_meshes([0.5 * vertices, vertices], faces, size=(80, 80))
    height = [(image[..., 3] > 0).any(axis=1).sum() for image in (small, large)]
    assert 2 * height[0] == pytest.approx(height[1], abs=3)
    _, extent = view_box([0.5 * vertices, vertices])
    assert extent == pytest.approx(1.06 * 2, rel=0.1)


def test_a_picture_may_be_transparent(tmp_path):
    from PIL import Image

    image = render(TRIANGLE, FRONT, size=(20, 20))
    write_picture(tmp_path / "a.png", image, background=None)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    write_picture(tmp_path / "b.jpg", image, background="black")
    assert np.asarray(Image.open(tmp_path / "b.jpg"))[0, -1].max() < 40


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((np.zeros((3, 2)), FRONT), r"'vertices' of shape \[N, 3\] .got \[3, 2\]"),
        ((np.full((3, 3), np.nan), FRONT), "finite 'vertices'"),
        ((TRIANGLE, FRONT + 1), "vertices from 0 to 2 .got 1 to 3"),
        ((TRIANGLE, FRONT * 1.0), "'faces' of shape .*integers .got float64"),
        ((TRIANGLE, FRONT[:0]), "'faces' of shape"),
        ((TRIANGLE, FRONT, np.zeros((2, 3))), r"'colors' of shape \[3\] or \[3, 3\]"),
        ((TRIANGLE, FRONT, SKIN, (0, 4)), "positive 'size'"),
    ],
)
def test_bad_input(args, error):
    with pytest.raises(ValueError, match=error):
        render(*args)


def test_bad_animations_leave_no_file(tmp_path):
    frame = render(TRIANGLE, FRONT, size=(4, 4))
    with pytest.raises(ValueError, match="'.gif' or '.mp4'"):
        write_animation(tmp_path / "film.avi", [frame])
    with pytest.raises(ValueError, match="at least one picture"):
        write_animation(tmp_path / "film.gif", [])
    assert not list(tmp_path.iterdir())
