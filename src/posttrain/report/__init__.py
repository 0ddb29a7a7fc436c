"""One self-contained HTML page per run, and the comparison of two runs; reads records only."""

import logging

# It speaks of its font cache and of a home it cannot write to, when it is imported; it does its work without either.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
