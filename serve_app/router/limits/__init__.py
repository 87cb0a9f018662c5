"""What callers may use, shared by all routers: who is let in, and where it is counted."""
