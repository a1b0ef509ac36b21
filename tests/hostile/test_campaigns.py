r"""Every family of hostile cases: a thousand in every run, and ten thousand in the long one."""

import os

import pytest

from tests.hostile.campaign import campaign
from tests.hostile.claims import NAMES

# Files and states take some ten milliseconds each; geometry and folders, of which some are trained
# in, ten times as long.
SOME = {"files": 500, "states": 300, "folders": 100, "geometry": 100}


def failures(family, start, stop, seconds=60):
    found = list(campaign(family, start, stop, seconds=seconds))
    assert len(found) == stop - start
    return [result for result in found if result.verdict != "held"]


@pytest.mark.parametrize("family", SOME)
def test_cases(family):
    assert failures(family, 0, SOME[family]) == []


def test_every_claim():
    assert failures("claims", 0, len(NAMES)) == []


# Classes, as a worker takes one at a time.
@pytest.mark.slow
class TestTenThousand:
    @pytest.mark.parametrize("part", range(1, 10))
    @pytest.mark.parametrize("family", SOME)
    def test_cases(self, family, part):
        cases = SOME[family]
        assert failures(family, part * cases, (part + 1) * cases) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
class TestKills:
    def test_trainings_go_on(self):
        assert failures("kills", 0, 16, seconds=300) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
class TestDisks:
    def test_a_full_one_leaves_whole_files(self):
        assert failures("disks", 0, 60, seconds=300) == []


def test_what_becomes_of_cases_is_told(tmp_path):
    r"""The campaign itself: whatever a case does, the next one runs."""
    found = list(campaign("examples", 0, 7, seconds=5))
    assert [result.verdict for result in found] == [
        "held",
        "wrong",
        "another error",
        "out of memory",
        "hangs",
        "dies",
        "held",
    ]
    assert [result.number for result in found] == list(range(7))
    assert found[1].said == "case 1: two is three"
