"""``python -m swl`` is the command ``swl``."""

import sys

from swl.cli import main

if __name__ == "__main__":
    sys.exit(main())
