"""A Hugging Face Hub on 127.0.0.1: a real HTTP server with real state, for the real client.

It is a test double of the Hub's wire protocol, not a mock of the client and not a Hub: no web pages but
the one for signing in, and Xet only for uploads, where a test turns it on.
"""

from .client import Client, ClientError
from .github import LoopbackGitHub
from .hub import LoopbackHub
from .journal import Fault, Request

__all__ = ["Client", "ClientError", "Fault", "LoopbackGitHub", "LoopbackHub", "Request"]
