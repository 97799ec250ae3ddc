"""Curvature matrices of a loss over data, as symmetric operators."""
