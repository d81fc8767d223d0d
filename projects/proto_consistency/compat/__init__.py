"""What belongs to the original code: its configurations and the files of MindSpore."""
