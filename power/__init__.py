"""Power policies as a library of its own; never imports ovt."""
