"""Models read from the Hub and results published to it: all that knows the Hub's client, but for jobs."""
