"""Heartbeats: what each rank writes about itself, and who is to blame when the group stands still.

    layout      the page's words, phases, and the snapshot that a reader makes of a page
    page        the writing side, in a rank
    reader      the reading side, in the watchdog
    process     what the kernel says about a page's owner
    intervals   pure: how long silence may last, from what was observed
    culprit     pure: findings (dead, hung, straggler, nobody) from the snapshots of all ranks

`docs/heartbeat.md` describes all of it.
"""
