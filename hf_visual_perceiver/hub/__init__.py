"""Model cards, publishing and Spaces."""
