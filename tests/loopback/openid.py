"""Signing in with the Hub: the OpenID code flow, with a page on which the browser's user says who they are.

Real signatures, so that the client's checks are real. Not here: trusted publishing (publishers).
"""

import html
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import parse_qs, urlencode

from . import publishers
from .repos import HubError, User
from .wire import Answer, Context, Exchange, Route, reply

LIFETIME = 8 * 3600
REPO_SCOPES = ("write-repos", "manage-repos")


@dataclass
class Grants:
    """Codes that are out, and what each application asked for."""

    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    scopes: list[str] = field(default_factory=list)


class OpenId:
    """The provider's rooms of the Hub."""

    def __init__(self) -> None:
        self.grants = Grants()

    def configuration(self, context: Context, x: Exchange) -> Answer:
        """Where everything is."""
        ends = {"authorization": "authorize", "token": "token", "userinfo": "userinfo"}
        found = {f"{name}_endpoint": f"{context.url}/oauth/{end}" for name, end in ends.items()}
        algorithms = {"id_token_signing_alg_values_supported": ["RS256"], "subject_types_supported": ["public"]}
        keys = {"issuer": context.url, "jwks_uri": f"{context.url}/oauth/jwks", "response_types_supported": ["code"]}
        return reply({**keys, **found, **algorithms})

    def keys(self, context: Context, x: Exchange) -> Answer:
        """The public key."""
        return reply({"keys": [_key().as_dict(private=False)]})

    def authorize(self, context: Context, x: Exchange) -> Answer:
        """A page with a button for each user; on the Hub there is one, for whoever is signed in there."""
        asked = {name: values[0] for name, values in x.params.items()}
        self.grants.scopes.append(asked.get("scope", ""))
        names = dict.fromkeys(user.name for user in context.world.users.values())
        links = "".join(
            f'<p><a href="/oauth/allow?{html.escape(urlencode({**asked, "user": name}))}">Authorize as {name}</a></p>'
            for name in names
        )
        links += f'<p><a href="/oauth/deny?{html.escape(urlencode(asked))}">Cancel</a></p>'
        page = f"<!doctype html><title>Loopback Hub</title><h1>Authorize {html.escape(asked['client_id'])}</h1>{links}"
        return Answer(200, {"Content-Type": "text/html; charset=utf-8"}, page.encode())

    def deny(self, context: Context, x: Exchange) -> Answer:
        """The user's no: back to the application, which is told."""
        return _back(x, error="access_denied", error_description="The user denied the request")

    def allow(self, context: Context, x: Exchange) -> Answer:
        """The user's yes: back to the application, with a code."""
        code = secrets.token_urlsafe(16)
        self.grants.codes[code] = {name: values[0] for name, values in x.params.items()}
        return _back(x, code=code)

    def token(self, context: Context, x: Exchange) -> Answer:
        """A token for a code, or for a CI job."""
        if "json" in x.headers.get("Content-Type", ""):
            return publishers.exchange(context, x)
        asked = {name: values[0] for name, values in parse_qs(x.body.read().decode()).items()}
        grant = self.grants.codes.pop(asked.get("code", ""), None)
        if grant is None or grant["redirect_uri"] != asked.get("redirect_uri"):
            raise HubError(400, "invalid_grant")
        return reply(self._granted(context, grant))

    def _granted(self, context: Context, grant: dict[str, str]) -> dict[str, Any]:
        name, scopes, token = grant["user"], grant["scope"].split(), f"hf_oauth_{secrets.token_hex(16)}"
        orgs = next(user.orgs for user in context.world.users.values() if user.name == name)
        is_wide = any(scope in scopes for scope in REPO_SCOPES)
        role = "write" if is_wide or "contribute-repos" in scopes else "read"
        context.world.users[token] = User(name, token, role, orgs, only_made=not is_wide)
        about = {
            "sub": name,
            "name": name,
            "preferred_username": name,
            "profile": f"{context.url}/{name}",
            "picture": "",
        }
        now = int(time.time())
        claims = {"iss": context.url, "aud": grant["client_id"], "iat": now, "exp": now + LIFETIME, **about}
        if "nonce" in grant:
            claims["nonce"] = grant["nonce"]
        found = {"access_token": token, "token_type": "bearer", "expires_in": LIFETIME, "scope": grant["scope"]}
        return {**found, "id_token": _signed(claims)}

    def userinfo(self, context: Context, x: Exchange) -> Answer:
        """Who a token belongs to."""
        if x.user is None:
            raise HubError(401, "Invalid username or password.")
        return reply({"sub": x.user.name, "preferred_username": x.user.name, "name": x.user.name})

    def routes(self) -> Iterable[Route]:
        """This room's part of the table."""
        yield Route("GET", "/.well-known/openid-configuration", self.configuration)
        yield Route("GET", "/oauth/jwks", self.keys)
        yield Route("GET", "/oauth/authorize", self.authorize)
        yield Route("GET", "/oauth/allow", self.allow)
        yield Route("GET", "/oauth/deny", self.deny)
        yield Route("GET", "/oauth/userinfo", self.userinfo)
        yield Route("POST", "/oauth/token", self.token)


def _back(x: Exchange, **says: str) -> Answer:
    to = x.param("redirect_uri")
    query = urlencode({**says, "state": x.param("state")})
    return Answer(302, {"Location": f"{to}{'&' if '?' in to else '?'}{query}"})


@cache
def _key() -> Any:
    from joserfc.jwk import RSAKey  # comes with the sign-in of the page that is tested; other tests do without

    return RSAKey.generate_key(2048, {"kid": "loopback", "use": "sig", "alg": "RS256"})


def _signed(claims: dict[str, Any]) -> str:
    from joserfc import jwt

    return jwt.encode({"alg": "RS256", "kid": "loopback"}, claims, _key())
