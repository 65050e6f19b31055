"""``python -m gpusaver``: the command of that name."""

import sys

from gpusaver.cli import main

if __name__ == "__main__":
    sys.exit(main())
