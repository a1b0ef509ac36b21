import json
import platform

import torch

from benchmarks import report


def test_machine_names_no_host():
    about = report.machine("cpu")
    assert about["torch"].startswith(torch.__version__.partition("+")[0])
    assert platform.node() not in json.dumps(about)


def test_report(tmp_path):
    tables = {"Times": [{"size": "a", "ms": 0.12345}, {"size": "b", "ms": None, "MiB": 12345}]}
    text = report.write(
        tmp_path / "new", "name", "python x.py", [{"ms": 0.12345}], tables, {"seed": 3}, ["Why."]
    )
    assert (tmp_path / "new" / "name.md").read_text() == text
    assert "| size | ms | MiB |\n| --- | --- | --- |\n| a | 0.123 | - |\n| b | - | 12,345 |" in text
    assert "python x.py" in text and "seed 3" in text and "* Why." in text
    content = json.loads((tmp_path / "new" / "name.json").read_text())
    assert content["rows"] == [{"ms": 0.12345}] and content["about"] == {"seed": 3}
