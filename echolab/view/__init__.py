"""`echolab view`: the reader and the charts of a report over a whole store, on this machine only."""
