"""The pass over the model: read, decode, batch, model, SAE."""
