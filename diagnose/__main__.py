"""`python -m diagnose`."""

import sys

from diagnose.command import main

sys.exit(main())
