"""Folders on disk: shards of trajectories, whose they are, and the state of a run."""
