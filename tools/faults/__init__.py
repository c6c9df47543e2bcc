"""``make faults``: everything that can be wrong with what a user brings, tried, and what happened.

One module for each kind of fault; each has lists of them, ``GROUPS``. :mod:`faults.trial` tries one of them and judges
whether it was caught as it should be. ``python -m faults`` (with ``tools`` on the path) tries all and writes
``results/faults.json``, of which ``docs/trust.md`` shows the table.
"""
