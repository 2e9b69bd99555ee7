"""Models that judge images or answers."""
