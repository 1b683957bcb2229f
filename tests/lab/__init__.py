"""The lab: an emulated host with the hardware that most machines lack, and the tests that run on it.

Its parts read in this order: packages (QEMU and the kernel), initramfs and acpi (what it boots with), machine (QEMU's
arguments, its life), channel and agent (commands in, output out), plugin and inside (pytest on both ends), conftest
(what a test inside can ask for). `scripts/lab` is __main__.py. CONTRIBUTING.md says what is emulated by what.
"""

import os

INSIDE = os.environ.get("LAB") == "1" and os.path.exists("/sys/class/virtio-ports")
