"""OVF and OVA appliances as a library of its own; never imports ovt."""
