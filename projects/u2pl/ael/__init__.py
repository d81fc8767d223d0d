"""U2PL on adaptive equalization learning (AEL)."""
