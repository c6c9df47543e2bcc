"""``python -m covidseg`` is the command ``covidseg``; ``torchrun`` starts it by this name."""

import signal


def main() -> None:
    """Runs the command. Ctrl-C leaves no trace even while modules are loaded, when there is nothing yet to tidy up."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored, as in the background
    if usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from covidseg.cli import main as command

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


if __name__ == "__main__":
    main()
