"""``python -m bench.kernels``: the ops compared with float64, then timed beside the frozen linear and other LoRA."""
