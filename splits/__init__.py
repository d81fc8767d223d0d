"""The data tool, `python -m splits`; beside it one folder per dataset."""
