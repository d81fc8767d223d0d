"""CPS: semi-supervised semantic segmentation with cross pseudo supervision (CVPR 2021)."""
