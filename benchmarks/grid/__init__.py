"""The parts of decode_grid.py: which points, whose kernels, how they are raced, what is said of the results."""
