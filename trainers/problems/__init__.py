"""The paper's small problems: the two-well surface and the kink regression."""
