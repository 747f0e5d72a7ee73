"""From batches of pairs to scores."""
