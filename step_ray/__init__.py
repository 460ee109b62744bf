"""step_ray: LLM agents trained on self-reflected trajectories with partial masking, on Ray.

Importing this package loads neither ray nor torch; import the module you need.
"""

__version__ = "0.1.0"
