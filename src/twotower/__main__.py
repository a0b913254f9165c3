"""`python -m twotower`, and `torchrun … -m twotower`."""

from twotower.cli.entry import main

main()
