"""Spectra of symmetric operators from products with vectors. Knows no network."""
