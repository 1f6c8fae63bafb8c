"""`python -m diagnose`."""

import sys

from diagnose.command import main

if __name__ == "__main__":
    sys.exit(main())
