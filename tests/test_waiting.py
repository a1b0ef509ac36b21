r"""Programs set how threads wait before torch is imported, which reads it once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("tyro", "pytorch_lightning"):
    pytest.importorskip(name)
ROOT = Path(__file__).parents[1]

# Prints the policy when torch is first asked for, and goes no further.
WATCH = """
import os, runpy, sys

def end():
    print("policy", os.environ.get("OMP_WAIT_POLICY"), flush=True)
    os._exit(0)

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            end()

sys.meta_path.insert(0, Watch())
{}
end()
"""


def programs():
    r"""What runs each program as far as to its main function."""
    found = {"cli": 'runpy.run_module("pyg_attnpool.cli", run_name="program")'}
    for path in sorted((ROOT / "examples").glob("*.py")):
        folder = f"sys.path.insert(0, {str(path.parent)!r})"
        found[f"examples/{path.name}"] = f"{folder}; runpy.run_path({str(path)!r})"
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[module] = f'runpy.run_module("{module}", run_name="program")'
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "code")
        found[f"notebooks/{path.name}"] = "\n".join(
            line for line in code.splitlines() if not line.startswith("%")
        )
    return found


@pytest.mark.parametrize("program", programs().items(), ids=lambda item: item[0])
def test_a_program_has_its_threads_wait_passively(program):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(program[1])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["policy", "passive"], done.stderr


def test_a_policy_of_the_user_stays():
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(programs()["cli"])],
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "active"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["policy", "active"], done.stderr
