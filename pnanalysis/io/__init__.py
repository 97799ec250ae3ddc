"""Files: run directories, weights and datasets. Knows no network."""
