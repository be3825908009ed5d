"""What must outlive a restart of the daemon."""
