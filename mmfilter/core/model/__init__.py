"""A multimodal model up to one layer, and the sparse codes of its states."""
