"""The command, and the Action that is a shell around it."""
