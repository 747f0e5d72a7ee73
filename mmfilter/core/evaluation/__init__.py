"""What check, sae eval and sae show --on use."""
