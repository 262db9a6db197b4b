"""A CPU's own attention: a kernel in Python, which Numba compiles and XLA calls as a foreign function."""
