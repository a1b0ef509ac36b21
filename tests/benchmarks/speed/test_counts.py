import json

import numpy as np
import pytest
from scipy.sparse import csr_array

from benchmarks.speed import cheb_conv, one_mesh, parameters
from pyg_attnpool.models.plan import Gather, Linear, Spiral
from pyg_attnpool.ops import _cpu


@pytest.mark.slow
def test_parameters_are_the_papers(capsys):
    parameters.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MeshHierarchy([5023, 1256, 314, 79, 20])")
    # Attention adds keys, queries, and two scalars a layer.
    more = 21 * 2 * 8341 + 2 * 8
    for line, qem in zip(lines[1:], (30_056, 179_656), strict=False):
        assert f"qem {qem:,}  attention {qem + more:,}  frozen {qem:,}" in line
    assert len(lines) == 1 + 4


def test_cheb_conv(capsys, one_thread):
    cheb_conv.main(num_vertices=300, batch_size=2, repeat=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("times as long" in line for line in lines[1:])


@pytest.mark.slow
def test_what_ships(capsys, one_thread):
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    from benchmarks.speed import export

    export.main(num_vertices=1300, repeat=1)
    out = capsys.readouterr().out
    shipped = [line.split()[-2] for line in out.splitlines() if line.endswith(" shipped")]
    assert len(shipped) == 2 and shipped[0] == shipped[1]
    for form in ("eager", "torch.export", "ONNX"):
        assert f"{form}: frozen attention takes" in out


def test_operations_and_bytes_of_a_plan():
    matrix = csr_array(np.eye(4, 3))  # three entries
    plan = [
        Linear(np.zeros((3, 2, 5)), np.zeros((3, 2))),  # 5 numbers to 6
        Gather(matrix),  # to 8
        Spiral(np.zeros((4, 7), int), np.zeros((7, 2, 3)), np.zeros(3)),  # to 12
    ]
    assert one_mesh.work(plan, 5) == [
        (2 * 30, 4 * (5 + 6 + 30)),
        (2 * 3 * 2, 4 * (6 + 8 + 2 * 3)),
        (2 * 4 * 42, 4 * (8 + 12 + 28 + 42)),
    ]


@pytest.mark.slow
def test_one_mesh(capsys, tmp_path, one_thread):
    if not _cpu.AVAILABLE:
        pytest.skip("there is no compiled library")
    one_mesh.main(num_vertices=(1300,), repeat=1, output=tmp_path)
    rows = json.loads((tmp_path / "one_mesh.json").read_text())["rows"]
    assert [row["model"] for row in rows[::2]] == ["CoMA", "Neural3DMM", "modal"]
    assert all(row["floor_seconds"] > 0 and row["difference"] < 1e-5 for row in rows)
