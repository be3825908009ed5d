"""`elastic-daemon drill`: a rank is killed under load, and what clients saw is compared."""
