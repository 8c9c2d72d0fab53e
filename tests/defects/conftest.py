import sys
from pathlib import Path

# The short trainings are those of the equivalence tests.
sys.path.append(str(Path(__file__).parents[1] / "equivalence"))
