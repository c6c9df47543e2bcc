"""Mutation testing: changes the package's modules in every small way and sees whether their tests notice.

Cosmic Ray knows the changes (:mod:`mutants.change`); its way to try them, a new Python for each, would spend most of
the time importing torch. Here one process imports what is heavy once and forks for each changed module
(:mod:`mutants.trial`), and the tests that killed most of the mutants before run first.
"""
