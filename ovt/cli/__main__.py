"""`python -m ovt.cli`: the same as `ovt`."""

from ovt.cli import main

main()
