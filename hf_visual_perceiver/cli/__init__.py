"""The `visual-perceiver` command, a file for each of its commands."""
