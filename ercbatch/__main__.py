"""`python -m ercbatch` is the command `ercbatch`."""

import signal


def run() -> None:
    """Run the command line; until it has taken charge, Ctrl-C ends it without more ado."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ercbatch.cli import main

    main(prog_name="ercbatch")


if __name__ == "__main__":
    run()
