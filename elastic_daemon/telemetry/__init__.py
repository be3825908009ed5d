"""What the daemon tells of itself: events, logs, metrics, traces."""
