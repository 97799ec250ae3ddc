"""TODO spectra"""
