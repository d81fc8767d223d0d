"""U2PL: semi-supervised semantic segmentation using unreliable pseudo-labels (CVPR 2022)."""
