"""A grid of runs: one after the other, or one on each GPU; then their tables and pages."""

from apt.runs.experiment.grid import Cell, Grid, cells, load_grid
from apt.runs.experiment.launch import run_experiment

__all__ = [
    "Cell",
    "Grid",
    "cells",
    "load_grid",
    "run_experiment",
]
