"""What is known of a model and its SAE; no torch."""
