"""The losses, one file per paper name."""
