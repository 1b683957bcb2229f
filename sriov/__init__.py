"""SR-IOV functions and multiqueue NICs as a library of its own; never imports ovt."""
