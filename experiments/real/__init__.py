"""The papers' claims on a model that was really pretrained: `python -m experiments.real`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the other experiments are scripts, which import `common` from beside them
