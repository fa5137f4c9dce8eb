"""Model cards, publishing, Spaces."""
