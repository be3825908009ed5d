"""The daemon's side of the watchdog: which GPU a rank is on, the process that watches, and what it says.

gpus       pure: which rank is on which GPU
driver     the GPUs of this host: simulated ones, or as the driver lists them
upkeep     pure: when to start, kill and give up the watchdog, by its signs of life
process    its process
desk       bindings to give, verdicts to take in
routes     the two over HTTP, on the Unix socket only
side       all of it together, as the supervisor uses it
"""
