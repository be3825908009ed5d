"""What the supervisor answers over HTTP."""
