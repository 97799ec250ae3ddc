"""The paper's experiments with controls of equal cost, as many small results that tables are made from."""
