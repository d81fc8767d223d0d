"""One folder per paper; no project imports another."""
