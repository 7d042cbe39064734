"""`python -m ercbatch` is the command `ercbatch`."""

from ercbatch.cli import main

main(prog_name="ercbatch")
