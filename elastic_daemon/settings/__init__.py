"""Settings, where they come from, and what a reload makes of them."""
