"""s4GAN + MLMT: semi-supervised segmentation with high- and low-level consistency (TPAMI 2021)."""
