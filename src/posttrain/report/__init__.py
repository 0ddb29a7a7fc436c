"""One self-contained HTML page per run, and the comparison of two runs; reads records only."""
