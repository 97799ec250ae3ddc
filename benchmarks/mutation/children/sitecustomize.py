"""Python imports this at the start of processes that tests with a fault start."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from faulty import load_with_fault_of_parent

sys.path.pop()
load_with_fault_of_parent()
