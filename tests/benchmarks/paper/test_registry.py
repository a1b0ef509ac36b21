from dataclasses import replace

import pytest

for name in ("tyro", "pytorch_lightning", "matplotlib"):
    pytest.importorskip(name)

from benchmarks.paper.__main__ import COMMANDS, PICTURES, main  # noqa: E402
from benchmarks.paper.registry import EXPERIMENTS  # noqa: E402
from benchmarks.paper.sweep import sweep  # noqa: E402
from pyg_attnpool.mesh import write_mesh  # noqa: E402
from tests.benchmarks.paper.few import rows_of  # noqa: E402
from tests.mesh.meshes import blob  # noqa: E402

# Settings of every table, each trained once, PCA among them.
RUNS = {
    "table1": 7,
    "table2": 5,
    "table3": 5,
    "table8": 3 * 3,  # expressions and models
    "table9": 5,
    "table10": 5,
    "table11": 4,
    "table12": 6,
    "figure3": 2 * 5,
    "figure10": 5,
    "figure15": 3,
    "figure16": 7,
    "figure17": 6,
    "figure18_19": 12,  # both figures share k = 2 and 32
    "ablation": 3 * 2 + 2 + 1,
}
MORE = {"figure3": ["--latent", 4, 8], "table12": ["--variant", "default"]}
RUNS_OF_MORE = {"table12": 5}  # what both name the default is one model
QUICK = ("table1",)


def test_every_table_is_tested():
    assert list(RUNS) == [e.name for e in EXPERIMENTS]
    assert list(COMMANDS) == [*RUNS, *PICTURES, "curves", "sharpening"]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]
)
def test_command(options, folder, name):
    args = [name, "--data", folder, "--scale", "smoke", "--seeds", 0, "--device", "cpu"]
    args += ["--root", options.root, "--output", options.output, *MORE.get(name, [])]
    main(*map(str, args))
    rows = rows_of(options.output / f"{name}.csv")
    text = (options.output / f"{name}.md").read_text(encoding="utf-8")
    assert text.count("\n| ") > len(rows) and "nan" not in text
    assert name.startswith("figure") == (options.output / f"{name}.png").exists()
    if name.startswith("figure"):
        assert (options.output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(rows) == RUNS_OF_MORE.get(name, RUNS[name])
    # PCA stands in every one.
    assert sum('"pca"' in row["model"] for row in rows) == {"figure3": 2, "table8": 3}.get(name, 1)


def test_table8_needs_expressions(options, tmp_path):
    (table8,) = (e for e in EXPERIMENTS if e.name == "table8")
    vertices, faces = blob(2, seed=0)
    (tmp_path / "flat").mkdir()
    for i in range(30):
        write_mesh(tmp_path / "flat" / f"{i:02d}.ply", (1 + 0.01 * i) * vertices, faces)
    with pytest.raises(ValueError, match="known 'expression'"):
        sweep(table8, replace(options, data=(str(tmp_path / "flat"),)))


def test_bad_latent_ends_before_any_work(options):
    with pytest.raises(ValueError, match=r"different positive 'latent' .got \[8, 8\]"):
        main("figure3", "--latent", "8", "8", "--output", str(options.output))
    assert not options.output.exists()


def test_help_lists_all_in_lines_that_fit(capsys):
    main("--help")
    listed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n    {name} " in listed
    assert max(map(len, listed.splitlines())) <= 100
    assert "python -m benchmarks.paper table1 --scale smoke" in listed


def test_unknown_names_end_with_the_known_ones(capsys):
    with pytest.raises(SystemExit, match=r"figure18_19(.|\n)*got 'tabel1'"):
        main("tabel1")
    with pytest.raises(SystemExit):
        main("table1", "--latent", "8")  # an option of figure 3
    assert "--latent" in capsys.readouterr().err
