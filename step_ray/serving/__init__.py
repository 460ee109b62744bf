"""The parts of serve.py: one replica, its generation, and the routes."""
