"""HTML for people, on one template."""
