"""What a run will need, from its configuration alone: no torch, no process group, no GPU."""
