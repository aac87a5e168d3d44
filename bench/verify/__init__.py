"""What shows that the kernels are right on a machine, before anything there is timed."""
