"""Real guests for the tests of virtual machines: whole systems built from the distribution's packages."""
