r"""The tables and figures of `"Learning Feature Aggregation for Deep 3D Morphable Models"
<https://arxiv.org/abs/2105.02173>`_, and two that ask why its layer wins.

What varies stands in :mod:`benchmarks.paper.registry`. :func:`benchmarks.paper.sweep.sweep` trains
every setting with every seed, keeps the results run by run, and writes the table or figure."""
