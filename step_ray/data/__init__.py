"""Tools for collected trajectories: counts, export, import. Light until one is used."""
