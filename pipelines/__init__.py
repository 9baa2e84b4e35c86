"""The `echolab` command, and what runs many library calls."""
