"""Models of many classes, each in a size that takes milliseconds: what docs/architectures.md says of them, tried."""
