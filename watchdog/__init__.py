"""The watchdog: a separate process that watches the serving daemon from outside."""
