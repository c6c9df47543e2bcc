"""``python -m covidseg`` is the command ``covidseg``; ``torchrun`` starts it by this name."""

from covidseg.cli import main

if __name__ == "__main__":
    main()
