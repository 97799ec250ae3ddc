"""``python -m pnanalysis``, as ``torchrun -m pnanalysis`` needs it."""

from pnanalysis.cli import main

if __name__ == "__main__":
    main()
