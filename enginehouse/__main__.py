"""`python -m enginehouse` is the `enginehouse` command."""

from enginehouse.cli import main

main(prog_name="enginehouse")
