"""`python -m merger` is the command `merger`."""

import sys

from merger.cli.commands import main

sys.exit(main())
