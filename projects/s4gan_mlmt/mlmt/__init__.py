"""The image-level branch: a multi-label mean teacher (MLMT), and its fusion with the segmentation branch."""
