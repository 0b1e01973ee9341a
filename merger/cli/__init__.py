"""The command and its words, which the Action and the Space speak too."""
