"""The only part of the daemon that touches vLLM internals."""
