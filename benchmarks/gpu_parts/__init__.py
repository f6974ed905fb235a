"""The parts of gpu_check.py, each a function that takes what it is to fill, `Found`, and the `Settings`."""
