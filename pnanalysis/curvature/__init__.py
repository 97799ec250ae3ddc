"""Curvature: operators, Lanczos, spectral densities and their summaries."""
