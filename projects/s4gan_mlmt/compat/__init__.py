"""The command lines of the original: flags, and what its scripts print and write."""
