"""The scores, one family a file, and their registry."""
