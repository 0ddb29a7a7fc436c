import sys
from pathlib import Path

# The benches are scripts that import each other by name.
sys.path.append(str(Path(__file__).parents[2] / "bench"))
