"""What a machine with a GPU must show, in three parts: ``python -m bench gpu-check right``, ``fast``, ``deep``.

gpu_check.py runs the pieces that parts.py lists, each a process of its own. A piece that has many items (every_op.py,
gpu_tests.py, every_case.py) checks them in workers, which report each (reports.py), so that an item that crashes, hangs
or ruins its device (device.py) costs only itself (workers.py). pytest_reports.py makes pytest a worker, and counters.py
is what the profiler looks at.
"""
