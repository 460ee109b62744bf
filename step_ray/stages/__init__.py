"""The stages of a run, which pipeline.py does in order."""
