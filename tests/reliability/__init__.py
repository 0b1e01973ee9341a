"""What may go wrong in a run, tried systematically: faults of the Hub, of the disk, and the process killed anywhere.

The loopback Hub spoils or kills at each request of a run in turn; each run is a process of its own. `rows` says what is
tried and what must hold, `page` writes docs/reliability.md from what was seen. No fault of the real Hub is known here.
"""
