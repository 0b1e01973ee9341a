"""How much is tried: some cases of each kind (`make test`), or all of them and many more draws (`make reliability`)."""

import os

import pytest

THOROUGH = os.environ.get("RELIABILITY") == "all"
thorough_only = pytest.mark.skipif(not THOROUGH, reason="tried by make reliability: others of its kind are tried here")
