r"""What becomes of hostile cases (tests/hostile): counts of every family, of this version and of
another one in a checkout of its own: ``python -m benchmarks.hostile --before PATH``."""

import json
import time
from collections import Counter
from pathlib import Path

from benchmarks import report
from tests.hostile.campaign import VERDICTS, campaign
from tests.hostile.claims import NAMES
from tests.hostile.tools import PAIRS

RESULTS = Path(__file__).parent / "results"
# Cases of a run, and whether an older version has what they need.
FAMILIES = {
    "claims": (len(NAMES), True),
    "tools": (len(PAIRS), True),
    "files": (1000, True),
    "states": (1000, True),
    "folders": (500, True),
    "geometry": (500, True),
    "kills": (24, False),
    "disks": (60, False),
}
NOTES = (
    "held: the right answer, or refused by name; wrong: another answer, or no error where there "
    "should be one; another error: one of a type or text that names nothing.",
    "A case runs in a process with a limit on memory, for so many seconds at most; 'dies' is a "
    "signal or the end of the process.",
    "claims: what was once seen to fail, one by one; tools: PyTorch's over layers and models; "
    "files: mesh files, good and damaged; states: loaded, cast and edited layers and arguments of "
    "operators; folders: damaged models, hierarchies, trainings, caches and arrays; geometry: "
    "repair, hierarchies, spirals, closest points; kills: three kills a case at random moments; "
    "disks: writers on a disk that is full after some bytes.",
    "Kills and disks are of this version alone, as an older one lacks what they need; its rows "
    "stay from the run that counted them.",
)


def count(family: str, cases: int, package: Path | None, seconds: float) -> dict:
    r"""Verdicts of a family."""
    start, verdicts = time.perf_counter(), Counter()
    by_layer: dict[str, dict] = {}
    if family in ("kills", "disks"):  # whose cases start processes of their own
        seconds *= 10
    for result in campaign(family, 0, cases, package, seconds):
        verdicts[result.verdict] += 1
        if family == "tools":
            layer, tool = PAIRS[result.number]
            by_layer.setdefault(layer, {"layer": layer})[tool] = result.verdict
        if result.verdict != "held" and package is None:
            print(result, flush=True)
    row = {"family": family, "cases": verdicts.total()}
    row |= {verdict: verdicts[verdict] for verdict in VERDICTS}
    row["seconds"] = time.perf_counter() - start
    return row | ({"by_layer": list(by_layer.values())} if by_layer else {})


def main(
    before: Path | None = None,
    commit: str = "before",
    families: tuple[str, ...] = tuple(FAMILIES),
    share: float = 1.0,
    share_before: float = 0.3,
    seconds: float = 30.0,
    seconds_before: float = 5.0,
    output: Path = RESULTS,
):
    r"""Counts, prints, and writes the tables after every family.

    Args:
        before: Checkout of another version, with its compiled operations, to count as well.
        commit: What the tables call that version.
        families: Names of families.
        share: Of the cases of a run.
        share_before: Of these, on the other version, where many wait for their time to be over.
        seconds: How long a case may take.
        seconds_before: And on the other version.
        output: Folder of the results.
    """
    path = output / "hostile.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for version, package in {commit: before, "now": None}.items():
        for family in families:
            cases, on_others = FAMILIES[family]
            older = version != "now"
            if older and (package is None or not on_others):
                continue
            if family not in ("claims", "tools"):
                cases = max(1, round(cases * share * (share_before if older else 1)))
            row = {"version": version}
            row |= count(family, cases, package, seconds_before if older else seconds)
            print({key: row[key] for key in row if key != "by_layer"}, flush=True)
            # What other runs have measured of other versions and families stays.
            same = {key: row[key] for key in ("version", "family")}
            rows = [old for old in rows if not same.items() <= old.items()] + [row]
            write(rows, output, seconds, seconds_before)


def write(rows: list[dict], output: Path, seconds: float, seconds_before: float) -> None:
    order = list(FAMILIES)
    rows = sorted(rows, key=lambda row: (row["version"] == "now", order.index(row["family"])))
    tables: dict[str, list[dict]] = {}
    for row in rows:
        shown = {key: row[key] for key in row if key not in ("version", "by_layer")}
        tables.setdefault(row["version"], []).append(shown)
    for row in rows:
        if "by_layer" in row:
            tables[f"tools by layer, {row['version']}"] = row["by_layer"]
    about = report.machine("cpu") | {"seconds a case": seconds, "of another": seconds_before}
    report.write(output, "hostile", report.command(), rows, tables, about, NOTES)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
