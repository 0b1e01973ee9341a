"""How much is tried: some cases of each kind (`make test`), or all of them and many more draws (`make reliability`)."""

import os

THOROUGH = os.environ.get("RELIABILITY") == "all"
