"""A whole run from a YAML: its settings, its data, its scores, its estimate, its report, and grids of runs."""
