"""What a run keeps: log, checkpoints, signals, random states."""
