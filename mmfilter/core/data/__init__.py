"""Shards, samples and the files of a run; knows nothing of models."""
