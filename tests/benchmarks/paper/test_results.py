import json

import pytest

from benchmarks.paper.results import ResultsFile
from tests.benchmarks.paper.few import line


def test_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "x.csv"
    file = ResultsFile(path)
    model = json.dumps({"family": "coma", "text": 'a "b", c'})
    for key in "ab":
        file.append(line(key=key, model=model))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    # Whatever of the last line has reached the disk.
    for cut in (ends[1] + 1, ends[2] - 20, ends[2] - 1):
        path.write_bytes(whole[:cut])
        file = ResultsFile(path)
        assert [row["key"] for row in file.rows] == ["a"] and file.rows[0]["model"] == model
        file.append(line(key="b", model=model))
        assert path.read_bytes() == whole
        assert file.rows == ResultsFile(path).rows
    # Nor is a torn header kept.
    path.write_bytes(whole[:10])
    file = ResultsFile(path)
    file.append(line(key="a", model=model))
    file.append(line(key="b", model=model))
    assert path.read_bytes() == whole


def test_damaged_or_foreign_files_are_refused(tmp_path, options):
    path = tmp_path / "x.csv"
    path.write_text("name,error\nqem,1.0\n")
    with pytest.raises(ValueError, match=r"results of a sweep in .*x.csv \(got other columns\)"):
        ResultsFile(path)
    path.unlink()
    ResultsFile(path).append(line())
    with open(path, "a") as file:
        file.write("1,2,3\n")
    with pytest.raises(ValueError, match=r"values in line 3 of .*x.csv \(got another number\)"):
        ResultsFile(path)
