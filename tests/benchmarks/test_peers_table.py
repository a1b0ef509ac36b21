import math

import matplotlib.image
import pytest
import torch
from torch.testing import assert_close

from benchmarks.peers import __main__ as peers
from benchmarks.peers import costs, data, tune
from benchmarks.peers.networks import MLP, TokenMixer
from benchmarks.peers.rows import append_row, read_rows
from benchmarks.peers.surface import edge_error, normal_angle, roughness
from pyg_attnpool import MeshHierarchy
from tests.mesh.meshes import blob


class Meshes:
    r"""What the runner takes of a data set."""

    subject = None

    def __init__(self):
        self.template = blob(4, seed=0)
        vertices = torch.from_numpy(self.template[0]).float()
        self.x = vertices * (1 + 0.1 * torch.randn(40, 1, 3)) + 0.01 * torch.randn(40, 1, 3)

    def split(self):
        return torch.arange(24), torch.arange(24, 32), torch.arange(32, 40)

    def read(self, index):
        return self.x[index]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    meshes = Meshes()
    for module in (peers, tune, data, costs):
        monkeypatch.setattr(module, "SETS", {"blobs": data.MeshSet(lambda root: meshes)})
    monkeypatch.setattr(tune, "GRID", (1e-3, 1e-2))
    rates = tmp_path / "rates.csv"
    for lr, val in ((1e-3, 7.0), (1e-2, 8.0)):
        values = ("blobs", 3, "MLP", 2, 100, lr, val)
        append_row(rates, tune.COLUMNS, dict(zip(tune.COLUMNS, values, strict=True)))

    def call(*more):
        options = ["--data", "blobs", "--latent", "3", "--steps", "2", "--root", str(tmp_path)]
        options += ["--output", str(tmp_path), "--rates", str(rates)]
        options += ["--costs", str(tmp_path / "costs.csv")]
        peers.main([*options, "--peers", "PCA", "MLP", *more])
        rows = read_rows(tmp_path / "peers.csv", peers.COLUMNS)
        table = (tmp_path / "peers.md").read_text(encoding="utf-8") if rows else ""
        return rows, table, capsys.readouterr().out

    return call


@pytest.mark.slow
def test_rates_are_looked_for_once(run, tmp_path, capsys):
    folder = tmp_path / "found"
    options = ["--data", "blobs", "--latent", "3", "--steps", "2", "--root", str(tmp_path)]
    options += ["--peers", "PCA", "MLP", "--output", str(folder), "--rates", "0.001", "0.01"]
    tune.main(options)
    rows = read_rows(folder / "rates.csv", tune.COLUMNS)
    assert [(row["peer"], row["lr"]) for row in rows] == [("MLP", "0.001"), ("MLP", "0.01")]
    best = min(rows, key=lambda row: float(row["val"]))
    assert tune.best_rate(folder / "rates.csv", "blobs", 3, "MLP") == float(best["lr"])
    capsys.readouterr()
    tune.main(options)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_second_call_goes_on_where_the_first_ended(run, tmp_path):
    rows, table, _ = run("--seeds", "0")
    assert [row["peer"] for row in rows] == ["PCA", "MLP"]
    assert [row["steps"] for row in rows] == ["0", "2"]
    assert [float(row["lr"]) for row in rows] == [0, 1e-3]  # the better one on validation meshes
    # The closed form: components of 24 meshes, of which 3 are kept.
    x = Meshes.read(data.SETS["blobs"].build(None), torch.arange(40)).double().flatten(1)
    mean = x[:24].mean(dim=0)
    v = torch.linalg.svd(x[:24] - mean, full_matrices=False)[2][:3]
    away = x[32:] - mean
    error = 1000 * (away - away @ v.t() @ v).unflatten(1, (-1, 3)).norm(dim=-1).mean()
    assert float(rows[0]["mean"]) == pytest.approx(error.item(), rel=1e-3)

    path = tmp_path / "peers.csv"
    content = path.read_bytes()
    path.write_bytes(content + b"blobs,24,3,ML")  # as a crash leaves it
    more, table, out = run("--seeds", "0", "1")
    assert more[:2] == rows and len(more) == 3 and more[2]["seed"] == "1"
    assert out.count("blobs, 24, 3") == 1  # one run was trained
    assert "| MLP, 2 steps | 0 1 |" in table and "±" in table
    mean = sum(float(row["mean"]) for row in more[1:]) / 2
    overview = f"| blobs | 24 | 3 | {float(rows[0]['mean']):.2f} | {mean:.2f} ± "
    assert any(line.startswith(overview) for line in table.splitlines())


def test_codes_of_as_many_channels_as_meshes_are_left_out(run):
    rows, _, out = run("--seeds", "0", "--meshes", "3")
    assert rows == [] and "of 3 meshes for 3 channels" in out


@pytest.mark.slow
def test_costs_are_measured_once_and_make_equal_time(run, tmp_path, capsys):
    options = ["--data", "blobs", "--latent", "3", "--root", str(tmp_path)]
    options += ["--peers", "PCA", "MLP", "--output", str(tmp_path)]
    costs.main(options)
    assert capsys.readouterr().out.count("blobs, 3") == 2
    costs.main(options)
    assert capsys.readouterr().out == ""
    found = costs.read_costs(tmp_path / "costs.csv")
    assert found["blobs", "3", "PCA"]["step_ms"] == 0 < found["blobs", "3", "MLP"]["step_ms"]
    # Single precision: a hidden layer of 512 there and back, and what every model has.
    weights = 2 * 3 * Meshes().x.size(1) * 512 * 4 / 1e6
    assert weights < found["blobs", "3", "MLP"]["disk_mb"] < 1.3 * weights

    with pytest.raises(ValueError, match=r"costs of \['modal'\]"):
        run("--as-long-as", "modal")
    cost = found["blobs", "3", "MLP"]
    cost |= {"start_s": 2.5, "step_ms": 6e3}
    every = found | {("blobs", "3", "modal"): {"start_s": 0.5, "step_ms": 1e4}}
    assert costs.as_long_as(every, "blobs", "3", "modal", "MLP", 4) == round((0.5 + 40 - 2.5) / 6)
    assert costs.as_long_as(every, "blobs", "3", "modal", "modal", 4) == 4
    assert costs.seconds_of(cost, 7) == 44.5

    _, text, _ = run("--seeds", "0")
    pixels = matplotlib.image.imread(tmp_path / "peers.png")
    assert pixels.std() > 0.05
    (line,) = [line for line in text.splitlines() if line.startswith("| MLP, 2 steps")]
    assert line.endswith(f"| {cost['disk_mb']:.0f} |") and cost["disk_mb"] > 10


def test_results_of_something_else_are_refused(run, tmp_path):
    (tmp_path / "peers.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="results of this script"):
        run()


@pytest.mark.parametrize("network", [MLP, TokenMixer])
def test_every_vertex_comes_from_the_code(network):
    hierarchy = MeshHierarchy.from_template(blob(2, seed=0), factors=[4])
    model = network(hierarchy, 4)
    x = torch.randn(2, hierarchy.num_vertices[0], 3, requires_grad=True)
    z = model.encode(x)
    assert z.shape == (2, 4)
    (of_x,) = torch.autograd.grad(z[0].sum(), x)
    assert (of_x[0].abs().amax(dim=1) > 0).all() and not of_x[1].any()
    out = model.decode(z)
    assert out.shape == x.shape and (out[0] - out[1]).abs().amax(dim=1).min() > 0


def test_regions_are_a_partition_in_the_order_of_vertices():
    hierarchy = MeshHierarchy.from_template(blob(2, seed=0), factors=[4])
    model = TokenMixer(hierarchy, 4)
    assert len(model.sizes) == 11 and min(model.sizes) > 0
    vertices = torch.arange(hierarchy.num_vertices[0])
    assert torch.equal(vertices[model.order][model.inverse], vertices)


def test_surface_measures_of_known_meshes():
    vertices, faces = (torch.from_numpy(a) for a in blob(2, seed=0))
    x = vertices.unsqueeze(0)
    turn = torch.tensor(0.3).double()
    turned = (
        x
        @ torch.tensor(
            [[turn.cos(), -turn.sin(), 0], [turn.sin(), turn.cos(), 0], [0, 0, 1]]
        ).double()
    )
    assert_close(edge_error(1.1 * x, x, faces), torch.tensor(0.1).double())
    assert edge_error(turned, x, faces) < 1e-9
    assert_close(roughness(1.5 * x, x, faces), torch.tensor(1.5).double())
    assert normal_angle(2 * x, x, faces) < 1e-3
    upside = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    tilted = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 0, 1]]])
    face = torch.tensor([[0, 1, 2]])
    assert_close(normal_angle(tilted, upside, face), torch.tensor(90.0))
    assert 0 < normal_angle(turned, x, faces) <= math.degrees(0.3) + 1e-6
