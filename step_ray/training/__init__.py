"""The parts of train.py: from conversations to masked examples, steps, checkpoints and models."""
