"""U2PL on adaptive equalisation learning (AEL)."""
