"""The paper's networks and data sets, registered by name."""
