# /// script
# requires-python = ">=3.11"
# dependencies = ["hub-merger @ https://github.com/OWNER/merger/archive/HEAD.zip"]
#
# [tool.hf-jobs]
# flavor = "cpu-upgrade"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
# ///
"""The command `merger` as a script that uv runs, here or on the Hub's machines, and installs what it takes.

    uv run merge.py plan recipe.yaml
    hf jobs uv run merge.py run recipe.yaml --to hf://you/merged

Not here: what the command does (merger).
"""

import sys

from merger.cli.commands import main

sys.exit(main())
