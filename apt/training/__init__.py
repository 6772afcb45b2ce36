"""What happens when in a run: the controller, the Trainer, checkpoints, and what a run leaves for its report."""
