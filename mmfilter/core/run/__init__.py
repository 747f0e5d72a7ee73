"""What a run keeps on disk, and every question asked of it."""
