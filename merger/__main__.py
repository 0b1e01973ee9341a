"""`python -m merger` is the command `merger`."""

import sys

from merger.cli import main

sys.exit(main())
