"""Semi-supervised semantic segmentation with prototype-based consistency regularization (NeurIPS 2022)."""
