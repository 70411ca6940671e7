"""The compiler's passes, one file each."""
