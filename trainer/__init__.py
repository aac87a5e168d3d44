"""A lean training loop around the fused head: ``python -m trainer --help``."""
