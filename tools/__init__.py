"""Bodies of the scripts that all papers share."""
