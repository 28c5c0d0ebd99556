"""`python -m tinsmith`."""

from tinsmith.cli import main

main()
