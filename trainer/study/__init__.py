"""Studies: many runs that differ by method, options and seed, and the table that compares them.

A study is one TOML file, of ``trainer/studies`` or one's own. ``grid`` reads it, ``results`` keeps what the runs gave,
``table`` compares them.
"""
