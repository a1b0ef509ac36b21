import pytest

from benchmarks.speed import cheb_conv, parameters


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
