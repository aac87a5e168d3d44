"""The injected faults, one file for each part of the sources."""

from . import autograd, cpu, cuda, python, triton

MUTANTS = python.MUTANTS + autograd.MUTANTS + cpu.MUTANTS + triton.MUTANTS + cuda.MUTANTS
