"""The bot on the Hub: merges that are asked for by a commit or a comment."""
