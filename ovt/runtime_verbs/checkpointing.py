"""checkpoint and restore, through CRIU."""
