"""What comes in: paths, URLs, pipes and stdin to samples, and back by byte range."""
