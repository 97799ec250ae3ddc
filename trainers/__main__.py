"""``python -m trainers``, as ``torchrun -m trainers`` needs it."""

from trainers.cli import main

if __name__ == "__main__":
    main()
