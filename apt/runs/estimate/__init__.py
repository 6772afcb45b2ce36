"""What a run would do, need and save, before it: from shapes alone, without weights."""
