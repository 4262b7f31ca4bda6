"""Load the plugin that knows what files need which library: a file outside of tests/ may need one too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))
pytest_plugins = ["needs"]
