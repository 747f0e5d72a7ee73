"""The kinds of input, one a file; `shards` opens the one that a name means."""
