import numpy as np
import pytest

from pyg_attnpool.datasets.anny.bodies import MOTIONS, _Bodies
from pyg_attnpool.datasets.anny.faces import EXPRESSIONS, _Faces
from pyg_attnpool.datasets.anny.transfer import transferred


@pytest.mark.slow
@pytest.mark.parametrize(
    "data, make, names", [("faces", _Faces, [*EXPRESSIONS]), ("bodies", _Bodies, [*MOTIONS])]
)
def test_motion_of_the_source_and_shape_of_the_target(data, make, names, tmp_path):
    pytest.importorskip("anny")
    there, own = transferred(data, [(0, 1, names[1]), (1, 1, names[1])], frames=5).numpy()
    # Of a subject to itself, a transfer is the sequence of the data set.
    source = make(tmp_path, 5, 0)
    np.testing.assert_allclose(own, next(source.blocks(len(names) + 1)), atol=1e-6)
    # What moves when is the source's: its displacements are closer to those of the source's own
    # sequence than the target's displacements are.
    first = next(source.blocks(1))
    moved, of_source, of_target = (x[2] - x[0] for x in (there, first, own))
    assert np.linalg.norm(moved - of_source) < 0.5 * np.linalg.norm(of_target - of_source)
    # The shape is the target's.
    at_rest = [np.linalg.norm(there[0] - x[0], axis=1).mean() for x in (own, first)]
    assert at_rest[0] < 0.3 * at_rest[1]


def test_bad_arguments():
    with pytest.raises(ValueError, match="'data' to be one of .*got 'hands'"):
        transferred("hands", [])
    with pytest.raises(ValueError, match="expressions of .*got 'yawn'"):
        transferred("faces", [(0, 1, "yawn")])
