"""Sampling of parameters around a checkpoint: Langevin chains, and whether they have converged."""
