"""One module per kernel interface, each the only owner of its paths, numbers and quirks; standard library only."""
