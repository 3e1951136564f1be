"""`python -m distopt` is the command `distopt`."""

from distopt.cli import main

main()
