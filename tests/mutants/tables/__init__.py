"""The injected faults, one file for each part of the sources."""

from . import cpu, cuda, python, triton

MUTANTS = python.MUTANTS + cpu.MUTANTS + triton.MUTANTS + cuda.MUTANTS
