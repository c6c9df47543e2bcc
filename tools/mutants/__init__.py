"""``make mutants``: changes modules of the package in every small way, and sees whether their tests notice.

Cosmic Ray knows the changes (:mod:`mutants.change`). Its way to try them, a new Python for each, would spend ten
seconds on each mutant to import torch, where its tests take one; so one process imports what is heavy, and forks for
each changed module (:mod:`mutants.trial`).
"""
