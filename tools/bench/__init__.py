"""``make bench``: covidseg's fast paths side by side with what a user would take instead, and how both grow.

One module a question; each has a function ``run(setup)`` that returns plain JSON. ``python -m bench`` (with ``tools``
on the path) asks all of them and writes ``results/bench-DEVICE.json``, of which ``docs/speed.md`` shows the tables.
"""
