"""The `visual-perceiver` command, with one file per subcommand."""
