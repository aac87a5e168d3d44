"""A lean training program around the fused head: ``python -m trainer --help``.

Each module imports only what stands below it: __main__; commands; presets and loop; run, state and step; data, methods,
optim, distributed, figures and metrics; backbones, weights, checkpoint and config; rebalfer_kernels. To add a method, a
data set or a command, add one file to that folder; nothing lists them.
"""
