"""Files, conditions of a measurement, console, tables."""
