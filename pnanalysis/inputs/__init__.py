"""What an analysis is given: runs, weight files or networks in memory, with their data and loss."""
