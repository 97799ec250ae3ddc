"""Curvature of the loss while a network trains, beside the stability threshold of its optimizer."""
