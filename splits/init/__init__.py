"""`python -m splits init`: from a folder of photos and whatever they were annotated with to a dataset and a study."""
