"""What can be asked of stored codes: which are alike, and which are duplicates; needs no model."""
