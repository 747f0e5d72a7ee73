"""What --top, --match, --diverse and --per mean."""
