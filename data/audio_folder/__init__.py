"""A user's own recordings with captions."""
