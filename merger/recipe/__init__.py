"""The recipe language: YAML text to a frozen Recipe. Reads no disk, no network, no tensor."""
