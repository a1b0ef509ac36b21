r"""Speed and scale, each measurement a module that runs by itself, as
:obj:`python -m benchmarks.speed.training`; :obj:`--help` lists its options. Results are kept in
:obj:`benchmarks/results/speed`."""
