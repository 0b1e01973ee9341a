"""Where models come from and where shards go: local folders and the Hub, behind the same two ports."""
