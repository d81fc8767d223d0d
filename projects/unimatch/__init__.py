"""UniMatch V1 and V2 with the FixMatch and supervised-only baselines of their repositories."""
