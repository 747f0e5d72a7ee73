"""A recipe: the whole way from shards to a selection in one YAML file."""
