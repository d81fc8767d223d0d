"""BRPG: boundary-refined prototype generation for semi-supervised segmentation (EAAI 137, 2024)."""
