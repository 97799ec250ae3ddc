"""Files: run directories, weights and datasets. Nothing here knows a network."""
