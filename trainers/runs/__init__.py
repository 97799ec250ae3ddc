"""Training into run directories: sessions, strategies, sweeps."""
