"""Xet: the route that gives out the right to write, and a storage that is hf_xet's own, in a folder.

The server never opens that folder (one process at a time may), so it believes what a commit says of an object's size,
and has no bytes of it to give. A test that wants them reads them with hf_xet where they were written.
"""

import time
from collections.abc import Iterable

from .commits import writable
from .repos import HubError
from .wire import Answer, Context, Exchange, Route, reply

LIFETIME = 3600


def write_token(context: Context, x: Exchange) -> Answer:
    """Where the storage is and a token for it, in the body and in the headers."""
    if context.xet is None:
        raise HubError(404, "this Hub has no Xet storage")
    writable(context, x, None if x.args["rev"] == "None" else x.args["rev"])
    place, token, ends = f"local://{context.xet}", "xet-token", int(time.time()) + LIFETIME
    headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(ends)}
    return reply({"casUrl": place, "exp": ends, "accessToken": token}, headers=headers)


def routes() -> Iterable[Route]:
    """This room's part of the table."""
    yield Route("GET", "/api/{repo}/xet-write-token/{rev}", write_token)
