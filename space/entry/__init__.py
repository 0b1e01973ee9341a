"""What each request passes before it reaches the page: whose it is, how long, with which session."""
