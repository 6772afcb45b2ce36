"""The first run on a GPU in one command: stages in processes of their own, the most valuable first, rows at once."""
