import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.testing import assert_close
from torch_geometric.data import Batch, Data

from pyg_attnpool import Mapping, MeshHierarchy, MorphableModel
from pyg_attnpool.fitting.solver import Decoder
from pyg_attnpool.mesh import write_mesh
from pyg_attnpool.mesh.closest import closest_points
from tests.mesh.meshes import blob, icosphere

TEMPLATE = blob(3, seed=0)
FACES = TEMPLATE[1]


def meshes(num, seed=0):
    r"""The template, of some 20 cm, stretched along its axes and bent."""
    rng = np.random.default_rng(seed)
    x = TEMPLATE[0] * rng.uniform(0.85, 1.15, size=(num, 1, 3))
    x[..., 0] += rng.normal(0, 0.1, size=(num, 1)) * x[..., 1] ** 2
    x[..., 2] += rng.normal(0, 0.1, size=(num, 1)) * x[..., 0] ** 2
    return torch.from_numpy(0.1 * x)


@pytest.fixture(scope="module")
def linear():
    model = MorphableModel.pca(TEMPLATE, 5).double()
    return model.fit(meshes(80).float())


@pytest.fixture(scope="module")
def curved():
    torch.manual_seed(0)
    hierarchy = MeshHierarchy.from_template(TEMPLATE, factors=[4, 4])
    model = MorphableModel.coma(hierarchy, 3, channels=(6, 8), activation="elu")
    x = meshes(60).float()
    model.set_statistics(x.mean(dim=0), x.std(dim=0).clamp(min=1e-3))
    with torch.no_grad():
        model.autoencoder.from_latent.weight.normal_()
    model.set_latent_statistics(x)
    return model


def motion(degrees, seed=0):
    r"""A rotation about a random axis, and a translation."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=3)
    rotation = Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis))
    return torch.from_numpy(rotation.as_matrix()), torch.from_numpy(rng.normal(size=3))


def mm(a, b):
    return 1000 * (a - b).norm(dim=-1)


def ridge(model, y, weight, noise):
    r"""The fit of a linear model to weighted vertices in closed form."""
    basis = model.autoencoder.components.flatten(1).t()
    w = weight.repeat_interleave(3) / noise**2
    offset = (y - model.decode(model.latent_mean[None])[0]).flatten()
    precision = torch.linalg.inv(model.latent_cov)
    return model.latent_mean + torch.linalg.solve(
        basis.t() @ (w[:, None] * basis) + precision, basis.t() @ (w * offset)
    )


def test_derivatives_are_those_of_autograd(curved):
    for dtype, tolerance in ((torch.double, 1e-8), (torch.float, 3e-3)):
        model = curved.to(dtype)
        decoder = Decoder(model)
        w = torch.randn(2, 3, dtype=torch.double)
        features = decoder(w)
        x, derivatives = features[..., 0], features[..., 1:]
        assert_close(x.to(dtype), model.decode(decoder.code(w)))
        # Seen from a few random directions of the output: all would be 1,926 backward passes.
        for i in range(2):
            v = w[i].clone().requires_grad_()
            out = model.decode(decoder.code(v[None]))[0]
            for _ in range(5):
                direction = torch.randn_like(out)
                (expected,) = torch.autograd.grad((direction * out).sum(), v, retain_graph=True)
                found = (direction.unsqueeze(-1) * derivatives[i]).sum(dim=(0, 1))
                scale = (direction.double().unsqueeze(-1) * derivatives[i]).norm()
                assert (found - expected).abs().max() < tolerance * scale
    curved.float()


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_some_vertices_are_ridge_regression(linear, noise):
    y = meshes(1, seed=3)[0]
    y = y + 0.002 * torch.randn_like(y)
    weight = torch.rand(len(y), dtype=torch.double) * (torch.rand(len(y)) < 0.1)
    unknown = y.masked_fill(weight[:, None] == 0, torch.nan)
    fit = linear.fit_to(unknown, weight=weight, noise=noise)
    expected = ridge(linear, y, weight, noise)
    assert_close(fit.code, expected, rtol=1e-8, atol=1e-10)
    assert_close(fit.mesh, linear.decode(expected[None])[0])
    assert fit.converged
    assert torch.equal(fit.residuals.isnan(), weight == 0)
    assert_close(fit.residuals, mm(fit.mesh, unknown), equal_nan=True)
    # A mask is weights of one.
    mask = weight > 0
    expected = ridge(linear, y, mask.double(), noise)
    assert_close(linear.fit_to(y, weight=mask, noise=noise).code, expected, rtol=1e-8, atol=1e-10)


def test_landmarks_on_vertices_and_on_faces(linear):
    y = meshes(1, seed=3)[0]
    some = torch.tensor([5, 300, 17, 600, 88])
    weight = torch.zeros(len(y), dtype=torch.double)
    weight[some] = 1
    expected = ridge(linear, y, weight, 1e-3)
    by_vertex = {int(i): y[i] for i in some}
    for landmarks in (by_vertex, (some, y[some]), (some.numpy(), y[some].numpy())):
        fit = linear.fit_to(landmarks=landmarks)
        assert_close(fit.code, expected, rtol=1e-8, atol=1e-10)
        assert_close(fit.residuals, mm(fit.mesh[some], y[some]))
    # Corners of faces say the same as vertices, and three of them what their middle says not.
    corners = torch.from_numpy(FACES[[3, 70, 500]])
    inside = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.double).expand(3, 3)
    mapping = Mapping(corners, inside, len(y))
    truth = linear(y[None])[0]
    fit = linear.fit_to(landmarks=(mapping, mapping @ truth), noise=1e-6)
    assert mm(mapping @ fit.mesh, mapping @ truth).max() < 1e-3
    assert mm(fit.mesh, truth).mean() < 10
    # Landmarks beside vertices count as they would among them.
    rest = torch.zeros(len(y), dtype=torch.double)
    rest[100:130] = 1
    both = linear.fit_to(y, weight=rest, landmarks=by_vertex)
    assert_close(both.code, ridge(linear, y, weight + rest, 1e-3), rtol=1e-8, atol=1e-10)


def test_a_motion_is_recovered(linear):
    truth = linear(meshes(1, seed=3))[0]
    rotation, translation = motion(150)
    for kind, scale in (("rigid", 1.0), ("similarity", 0.37)):
        y = scale * truth @ rotation.t() + translation
        weight = torch.zeros(len(y))
        weight[::7] = 1
        fit = linear.fit_to(y, weight=weight, motion=kind, noise=1e-7)
        assert fit.converged
        assert_close(fit.mesh, y, atol=1e-6, rtol=0)
        moved = fit.scale * linear.decode(fit.code[None])[0] @ fit.rotation.t() + fit.translation
        assert_close(moved, fit.mesh)
        assert_close(fit.rotation @ fit.rotation.t(), torch.eye(3).double())
        assert_close(fit.rotation, rotation, atol=1e-3, rtol=0)
        if kind == "rigid":
            assert fit.scale == 1
            assert_close(fit.code, linear.encode(truth[None])[0], atol=1e-4, rtol=0)


def test_a_batch_is_its_meshes(curved):
    x = curved.sample(17, generator=torch.Generator().manual_seed(4))  # more than at a time
    rotation, translation = motion(40)
    y = x @ rotation.t().float() + translation.float()
    weight = (torch.rand(17, x.size(1)) < 0.2).float()
    fit = curved.fit_to(y, weight=weight, motion="rigid", noise=1e-3)
    assert fit.mesh.shape == x.shape and fit.converged.all()
    for i in (0, 16):
        one = curved.fit_to(y[i], weight=weight[i], motion="rigid", noise=1e-3)
        assert_close(one.mesh, fit.mesh[i], atol=2e-4, rtol=0)
        assert one.residuals.shape == (x.size(1),)


def test_the_minimum_of_a_curved_model(curved):
    r"""No other minimiser finds less."""
    from scipy.optimize import minimize

    curved.double()
    try:
        y = curved.sample(1, generator=torch.Generator().manual_seed(5))[0]
        weight = torch.zeros(len(y)).double()
        weight[::11] = 1
        fit = curved.fit_to(y, weight=weight, noise=3e-3)
        precision = torch.linalg.inv(curved.latent_cov)

        def objective(z):
            z = torch.from_numpy(z)
            squares = (curved.decode(z[None])[0] - y).square().sum(dim=1) / 3e-3**2
            away = z - curved.latent_mean
            return ((weight * squares).sum() + away @ precision @ away).item()

        best = minimize(objective, curved.latent_mean.numpy(), method="Nelder-Mead", tol=1e-10)
        assert objective(fit.code.numpy()) <= best.fun * (1 + 1e-9)
        assert objective(fit.code.numpy()) < 0.5 * objective(curved.latent_mean.numpy())
        assert fit.converged
    finally:
        curved.float()


class Circle(torch.nn.Module):
    r"""Meshes on a circle, along which the code goes."""

    latent_channels = 1

    def encode(self, x):
        return torch.atan2(x[:, 0, 1], x[:, 0, 0] + 1).unsqueeze(1) / 2

    def decode(self, z):
        away = torch.cat([(2 * z).cos() - 1, (2 * z).sin(), torch.zeros_like(z)], dim=1)
        return away.unsqueeze(1).expand(-1, len(TEMPLATE[0]), -1)


def test_a_fit_finds_what_the_way_from_the_mean_does_not_lead_to():
    model = MorphableModel(Circle(), TEMPLATE)
    model.set_statistics(model.template, torch.full_like(model.std, 0.05))
    # From the mean, the opposite side of the circle is as far in both directions.
    codes = torch.tensor([[0.0], [torch.pi / 2], [0.3]])
    y = model.decode(codes)
    fit = model.fit_to(y, weight=(torch.arange(y.size(1)) % 7 == 0).float(), noise=1e-4)
    assert mm(fit.mesh, y).max() < 0.1
    assert_close(fit.code.abs(), codes, atol=1e-3, rtol=0)
    assert fit.converged.all()


def partial(mesh, noise=0.0, seed=0, part=0.65):
    r"""A scan of one side of a mesh, with vertices and faces of its own."""
    rng = np.random.default_rng(seed)
    vertices = mesh.double().numpy()
    # Its own vertices: the centre of every face joins its corners.
    centres = vertices[FACES].mean(axis=1)
    a, b, c = FACES.T
    d = len(vertices) + np.arange(len(FACES))
    faces = np.concatenate([np.stack(t, axis=1) for t in ((a, b, d), (b, c, d), (c, a, d))])
    vertices = np.concatenate([vertices, centres])
    height = vertices[faces].mean(axis=1) @ np.array([0.3, 0.2, 1.0])
    faces = faces[height > np.quantile(height, 1 - part)]
    used = rng.permutation(np.unique(faces))
    place = np.empty(len(vertices), dtype=int)
    place[used] = np.arange(len(used))
    return vertices[used] + noise * rng.normal(size=(len(used), 3)), place[faces]


@pytest.mark.parametrize("degrees", [0, 30, 60, 170])
def test_a_partial_scan_in_any_pose(linear, degrees):
    truth = linear(meshes(1, seed=3))[0]
    rotation, translation = motion(degrees, seed=degrees)
    vertices, faces = partial(truth, noise=2e-4)
    scan = vertices @ rotation.numpy().T + translation.numpy()
    fit = linear.fit_to((scan, faces))
    assert fit.converged
    assert mm(fit.mesh, truth @ rotation.t() + translation).mean() < 2
    distance = closest_points(scan, fit.mesh.numpy(), FACES)[2]
    np.testing.assert_allclose(fit.residuals, 1000 * distance, atol=1e-3)
    assert np.median(distance) < 3e-4


@pytest.mark.parametrize("degrees", [10, 100, 180])
def test_the_shape_tells_which_of_equal_poses_is_right(degrees):
    # The mean is the same when it is turned by half about one axis; no other mesh is, since what
    # grows and shrinks is at one end.
    unit, faces = icosphere(3)
    at = [np.exp(-((unit - axis) ** 2).sum(axis=1) / 0.2)[:, None] for axis in np.eye(3)[[0, 2]]]
    x = 0.1 * unit * [1.0, 0.7, 0.45] * (1 + 0.4 * at[1])
    end, size = np.linspace(-0.35, 0.35, 15), np.tile([0.9, 1.0, 1.1], 5)
    bodies = x * (1 + end[:, None, None] * at[0]) * size[:, None, None]
    model = MorphableModel.pca((x, faces), 2).double().fit(torch.from_numpy(bodies).float())
    truth = model(torch.from_numpy(bodies[-1:]))[0]
    rotation, translation = motion(degrees, seed=degrees)
    moved = truth @ rotation.t() + translation
    fit = model.fit_to((moved.numpy(), faces))
    assert fit.converged and mm(fit.mesh, moved).mean() < 0.5


def test_point_clouds_and_landmarks(linear):
    truth = linear(meshes(1, seed=3))[0]
    rotation, translation = motion(90, seed=1)
    moved = truth @ rotation.t() + translation
    vertices, _ = partial(truth)
    cloud = torch.from_numpy(vertices) @ rotation.t() + translation
    fit = linear.fit_to(Data(pos=cloud))
    assert fit.converged and mm(fit.mesh, moved).mean() < 4
    some = [5, 300, 17, 600]
    marked = linear.fit_to(Data(pos=cloud), landmarks={i: moved[i] for i in some})
    assert marked.converged and mm(marked.mesh, moved).mean() < 4
    # The scale is found as well, where landmarks tell the start.
    fit = linear.fit_to(
        Data(pos=0.5 * cloud), landmarks={i: 0.5 * moved[i] for i in some}, motion="similarity"
    )
    assert mm(fit.mesh, 0.5 * moved).mean() < 4


def test_outliers_count_little(linear):
    truth = linear(meshes(1, seed=3))[0]
    vertices, faces = partial(truth, part=0.8)
    clean = linear.fit_to((vertices, faces), motion="none")
    # A lump beside the scan, one sixth of it.
    num = len(vertices) // 6
    lump = 0.02 * np.random.default_rng(0).normal(size=(num, 3)) + [0.15, 0.0, 0.12]
    fit = linear.fit_to(Data(pos=torch.from_numpy(np.concatenate([vertices, lump]))), motion="none")
    assert mm(clean.mesh, truth).mean() < 1
    assert mm(fit.mesh, truth).mean() < 3


def test_a_file_is_read_in_the_unit_of_the_model(linear, tmp_path):
    vertices, faces = partial(meshes(1, seed=3)[0])
    write_mesh(tmp_path / "scan.ply", 1000 * vertices, faces)
    linear.unit = "mm"
    try:
        fit = linear.fit_to(tmp_path / "scan.ply")
    finally:
        linear.unit = "m"
    assert_close(fit.mesh, linear.fit_to((vertices, faces)).mesh, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_fit_repeats(linear):
    scan = partial(meshes(1, seed=3)[0])
    first, second = linear.fit_to(scan), linear.fit_to(scan)
    assert torch.equal(first.mesh, second.mesh)


def test_several_scans_are_fitted_one_by_one(linear):
    truth = linear(meshes(2, seed=3))
    scans = [partial(truth[0], part=0.8), partial(truth[1], part=0.6)]
    alone = [linear.fit_to(scan, motion="none") for scan in scans]
    graphs = [
        Data(pos=torch.from_numpy(vertices), face=torch.from_numpy(faces).t())
        for vertices, faces in scans
    ]
    for several in (scans, graphs, Batch.from_data_list(graphs)):
        fits = linear.fit_to(several, motion="none")
        assert fits.mesh.shape == truth.shape and fits.converged.shape == (2,)
        for i, (fit, (vertices, _)) in enumerate(zip(alone, scans, strict=True)):
            assert_close(fits.mesh[i], fit.mesh)
            assert_close(fits.residuals[i, : len(vertices)], fit.residuals)
            assert fits.residuals[i, len(vertices) :].isnan().all()
    # Landmarks of each, in a batch.
    some = torch.tensor([5, 300, 17, 600])
    marked = linear.fit_to(graphs, landmarks=(some, truth[:, some]), motion="none")
    assert (mm(marked.mesh, truth).mean(dim=1) < 1).all()


def test_what_no_likely_code_explains_has_not_converged(linear):
    x = meshes(2, seed=3)
    assert linear.fit_to(x).converged.all()
    with pytest.warns(UserWarning, match="millimetres"):
        assert not linear.fit_to(torch.cat([x, 1000 * x[:1]])).converged[2]
    far = {i: x[0, i] + 0.5 for i in range(0, 600, 30)}
    assert not linear.fit_to(landmarks=far).converged


def test_some_vertices_alone_are_decoded_as_all_are(linear, curved):
    modal = MorphableModel.modal(curved.hierarchy, 2, modes=4, level=1)
    modal.set_statistics(meshes(20).mean(dim=0).float(), torch.full((642, 3), 0.01))
    modal.autoencoder.fit_modes(lambda: [modal.standardize(meshes(20).float())])
    modal.set_latent_statistics(meshes(20).float())
    some = torch.tensor([641, 3, 50])
    for model in (linear, curved, modal):
        every, few = Decoder(model), Decoder(model, vertices=some)
        w = torch.randn(3, every.size).double()
        assert_close(few(w), every(w)[:, some], atol=1e-5, rtol=1e-3)

    class Shifted(type(linear.autoencoder)):
        def decode(self, z):
            return super().decode(z) + 0.25

    shifted = Shifted.empty(642, 5).double()
    shifted.load_state_dict(linear.autoencoder.state_dict())
    model = MorphableModel(shifted, TEMPLATE).double()
    model.set_statistics(linear.mean, linear.std)
    model.latent_cov.copy_(linear.latent_cov)
    w = torch.randn(1, 5).double()
    assert_close(Decoder(model, vertices=some).vertices(w), Decoder(model).vertices(w)[:, some])
    assert_close(
        Decoder(model).vertices(w) - Decoder(linear, model.latent_mean).vertices(w),
        (0.25 * linear.std).expand(1, -1, -1),
    )


def test_edits_move_what_they_are_asked_to(linear, curved):
    for model in (linear, curved):
        x = model(meshes(1, seed=3).to(model.mean))[0]
        z = model.encode(x[None])[0]
        start = model.decode(z[None])[0]
        handle = 40
        other = model(meshes(1, seed=6).to(model.mean))[0]
        target = start[handle] + 0.7 * (other[handle] - start[handle])
        fit = model.edit(x, {handle: target}, noise=1e-4)
        assert fit.residuals.shape == (1,) and fit.residuals.item() < 0.3
        assert_close(fit.mesh, model.decode(fit.code[None])[0])
        # Nothing asked for, nothing done.
        same = model.edit(z, {handle: start[handle]}, noise=1e-4)
        assert_close(same.code, z, atol=1e-4, rtol=1e-4)
        # What is kept moves less.
        keep = (start - start[handle]).norm(dim=1) > 0.08
        held = model.edit(x, {handle: target}, keep, noise=1e-4)
        assert mm(held.mesh, start)[keep].mean() < 0.9 * mm(fit.mesh, start)[keep].mean()


def test_an_edit_of_a_linear_model_in_closed_form(linear):
    x = meshes(1, seed=3)[0]
    z = linear.encode(x[None])[0]
    target = x[40] + 0.01
    row = linear.autoencoder.components[:, 40].t()  # [3, L]
    offset = target - linear.decode(z[None])[0, 40]
    cov = linear.latent_cov
    gain = cov @ row.t() @ torch.linalg.inv(row @ cov @ row.t() + 1e-6 * torch.eye(3).double())
    fit = linear.edit(x, {40: target})
    assert_close(fit.code, z + gain @ offset, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda m, x: m.fit_to([(x, None), x]), TypeError, "a list of scans alone .got Tensor"),
        (
            lambda m, x: m.fit_to([(x, None)] * 2, landmarks={0: x[0], 1: x[1], 2: x[2]}),
            ValueError,
            "landmarks of 2 scans .got of 1",
        ),
        (lambda m, x: m.fit_to(), ValueError, "observations or landmarks"),
        (
            lambda m, x: m.fit_to(x[:100]),
            ValueError,
            r"\[642, 3\].*template .*\[100, 3\].*point cloud",
        ),
        (lambda m, x: m.fit_to("none.ply"), FileNotFoundError, "none.ply"),
        (lambda m, x: m.fit_to({3: x[3]}), TypeError, "observations .*dict"),
        (lambda m, x: m.fit_to(x * torch.nan), ValueError, "finite vertices.*'weight' of zero"),
        (lambda m, x: m.fit_to(x, weight=torch.ones(9)), ValueError, r"'weight' of shape \[642\]"),
        (
            lambda m, x: m.fit_to(x, weight=-torch.ones(642)),
            ValueError,
            "'weight' of at least zero",
        ),
        (lambda m, x: m.fit_to(x, weight=torch.zeros(642)), ValueError, "some of each mesh above"),
        (lambda m, x: m.fit_to(x, motion="affine"), ValueError, "'motion' .*got 'affine'"),
        (lambda m, x: m.fit_to(x, noise=0), ValueError, "'noise' .*got 0"),
        (lambda m, x: m.fit_to(x, max_iterations=0), ValueError, "'max_iterations' .*got 0"),
        (lambda m, x: m.fit_to(landmarks={642: x[0]}), ValueError, "from 0 to 641 .*642"),
        (lambda m, x: m.fit_to(landmarks={1.5: x[0]}), TypeError, "by number .*float32"),
        (lambda m, x: m.fit_to(landmarks=x), TypeError, "landmarks as positions .*Tensor"),
        (lambda m, x: m.fit_to(landmarks=([1, 2], x[:3])), ValueError, r"\[2, 3\] .*\[3, 3\]"),
        (
            lambda m, x: m.fit_to(landmarks={1: x[1], 2: x[2]}, motion="rigid"),
            ValueError,
            "three points for a motion .got 2",
        ),
        (
            lambda m, x: m.fit_to(landmarks=(Mapping.from_matrix(torch.eye(9)), x[:9])),
            ValueError,
            "landmarks on 642 vertices .got on 9",
        ),
        (lambda m, x: m.fit_to(Data(pos=x[:2])), ValueError, r"three points .*\[2, 3\]"),
        (lambda m, x: m.fit_to(Data(pos=1000 * x)), ValueError, "in metres .*another unit"),
        (lambda m, x: m.fit_to(Data(pos=x * torch.nan)), ValueError, "finite points"),
        (lambda m, x: m.fit_to((x, FACES + 9)), ValueError, "from 0 to 641 .got 9 to 650"),
        (lambda m, x: m.fit_to((x, FACES * 1.0)), ValueError, "by number .got float64"),
        (
            lambda m, x: m.fit_to((x, FACES), weight=x[:, 0]),
            ValueError,
            "no 'weight' beside a scan",
        ),
        (lambda m, x: m.edit(x, {}), ValueError, "landmarks at vertices"),
        (lambda m, x: m.edit(x, [x[0]]), TypeError, "'targets' .*list"),
        (lambda m, x: m.edit(x[None], {0: x[0]}), ValueError, "one mesh or code .*batch of 1"),
        (lambda m, x: m.edit(x, {0: x[0]}, torch.ones(5)), ValueError, r"'keep' of shape \[642\]"),
        (
            lambda model, x: model.fit_to(Data(pos=torch.full((9, 3), 0.1)), motion="similarity"),
            ValueError,
            "at different places .*size of 0",
        ),
        (
            lambda model, x: model.fit_to((x, np.array([[0, 0, 1], [2, 1, 2]]))),
            ValueError,
            "faces of a scan with an area",
        ),
        (
            lambda model, x: model.fit_to(
                (x, FACES), landmarks=([1, 2, 3], x[[1, 1, 1]]), motion="similarity"
            ),
            ValueError,
            "different places for a motion",
        ),
        (
            lambda model, x: model.fit_to(None, landmarks=([4, 4, 4], x[:3]), motion="rigid"),
            ValueError,
            "different places for a motion",
        ),
    ],
)
def test_bad_observations(linear, call, error, match):
    with pytest.raises(error, match=match):
        call(linear, meshes(1)[0])


def test_a_model_of_one_mesh_alone_has_nothing_to_fit():
    model = MorphableModel.pca(TEMPLATE, 2).fit(meshes(1).float().expand(4, -1, -1))
    with pytest.raises(ValueError, match="codes of training meshes that vary"):
        model.fit_to(meshes(1).float()[0])


def test_a_scan_of_something_else_has_not_converged(linear):
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.uniform(-0.3, 0.3, size=(500, 3)))
    assert not linear.fit_to(Data(pos=noise)).converged
    far = meshes(1)[0] + 5
    assert not linear.fit_to((far, FACES), motion="none").converged
