"""The container engine: an OCI bundle becomes processes by the kernel's interfaces; knows no instances, no people."""
