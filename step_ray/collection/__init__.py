"""The parts of collect.py and evaluate.py: judging, actors, counts and limits of failure."""
