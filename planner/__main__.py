"""`python -m planner` is `vramwise`."""

import sys

from planner.cli import main

sys.exit(main())
