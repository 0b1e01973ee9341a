"""Who may do what with a repo, and what the Hub says when they may not. Only rules: no state is kept here, no HTTP."""

from .repos import HubError, Repo, User, World

NEEDS_LOGIN = "Invalid username or password."


def authenticate(world: World, header: str | None) -> User | None:
    """The user behind an Authorization header; None when there is no header."""
    if header is None or header.startswith("Basic "):  # an application's own name, when a user signs in to it
        return None
    user = world.users.get(header.removeprefix("Bearer ").strip())
    if user is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return user


def open_repo(world: World, key: str, user: User | None, right: str) -> Repo:
    """The repo, if this user has the right: read (the listing), files, contribute (pull requests) or write."""
    repo = world.repos.get(key)
    if repo is None or (repo.private and not is_member(repo, user)):
        # The Hub asks an anonymous caller to log in first (401), and answers 404 to one it knows.
        raise HubError(404 if user else 401, "Repository not found" if user else NEEDS_LOGIN, "RepoNotFound")
    if right != "read":
        _need_files(repo, user)
    if right in ("contribute", "write"):
        need_write_token(user)
    is_strange = user is not None and user.only_made and not repo.made_by_app
    if right == "write" and (is_strange or not is_member(repo, user)):
        raise HubError(403, "Authorization error.")
    return repo


def is_member(repo: Repo, user: User | None) -> bool:
    """Whether the repo is the user's own, or their organisation's."""
    if user is None:
        return False
    return user.repo == repo.id or bool({repo.owner, repo.id.split("/")[0]} & set(user.namespaces))


def need_write_token(user: User | None) -> None:
    """Refuse anonymous callers and read tokens."""
    if user is None:
        raise HubError(401, NEEDS_LOGIN)
    if user.role != "write":
        raise HubError(403, "You must use a write token to upload to a repository")


def need_namespace(user: User | None, namespace: str) -> None:
    """Refuse to create or delete under somebody else's name."""
    need_write_token(user)
    if user is None or namespace not in user.namespaces:
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')


def _need_files(repo: Repo, user: User | None) -> None:
    if not repo.gated or is_member(repo, user) or (user and user.name in repo.granted):
        return
    wall = f"Access to model {repo.id} is restricted"
    if user is None:
        raise HubError(401, f"{wall}. You must have access to it and be authenticated to access it.", "GatedRepo")
    raise HubError(403, f"{wall} and you are not in the authorized list.", "GatedRepo")
