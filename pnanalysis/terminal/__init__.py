"""Output on a terminal: tables, messages and progress bars."""
