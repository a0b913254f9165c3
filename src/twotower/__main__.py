"""`python -m twotower`, and `torchrun … -m twotower`."""

from twotower.cli.main import main

main()
