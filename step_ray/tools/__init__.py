"""What `step-ray show`, `replay` and `play` do with what a run has left."""
