"""What a selection writes."""
