"""The lean trainer's room: it imports echolab, never pipelines."""
