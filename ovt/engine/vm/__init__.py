"""The engine that runs virtual machines: QEMU as the one process of a container, reached over QMP."""
