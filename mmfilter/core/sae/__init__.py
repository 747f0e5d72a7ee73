"""Sparse autoencoders: encode, decode, and every published layout through one door."""
