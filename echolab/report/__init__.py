"""The report of a store: one HTML file with its charts and a reader of rollouts."""
