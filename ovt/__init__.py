"""ovt: one tool and one library for a Linux host's guests."""

__version__ = "0.1.0"
