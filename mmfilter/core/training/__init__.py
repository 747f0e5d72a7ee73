"""Training of sparse autoencoders on residual states of image and text tokens."""
