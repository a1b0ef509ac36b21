r"""The paper's tables and figures, and measurements of speed and scale. They run from the root of
the repository: :obj:`python -m benchmarks.paper table1`, :obj:`python -m benchmarks.speed.ops`."""

import os

# Threads that spin while they wait slow a busy machine ten times. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
