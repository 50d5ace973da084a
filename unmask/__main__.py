"""`python -m unmask` is the same as `unmask`."""

from unmask.cli import main

main()
