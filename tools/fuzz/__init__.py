"""``make fuzz``: broken files for everything of covidseg that reads files, guided by which lines they reach.

A target (:mod:`fuzz.targets`) takes bytes, puts them where a user's file would lie and reads them. A good result or a
:class:`covidseg.errors.CovidsegError` is what should come of it; anything else is a finding and ends the search there.
atheris finds the bytes (:mod:`fuzz.worker`): from small whole files, by libFuzzer's changes and the words of
``tokens.dict``, keeping what reaches a new line. ``python -m fuzz`` (with ``tools`` on the path) gives each target a
process of its own and writes ``results/fuzz.json``.
"""
