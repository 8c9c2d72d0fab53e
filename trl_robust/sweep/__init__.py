"""Grids of runs: reading one, saying what in it cannot differ, running what is missing, comparing the outcomes."""
