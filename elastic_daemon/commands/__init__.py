"""What an operator types: commands, their arguments, and how they reach a daemon."""
