"""A real Kubernetes on this machine, for tests and for `make cluster`; see README.md beside this file.

Standard library only: it runs before anything is installed.
"""


class LabError(Exception):
    """Why the lab cannot do what was asked, and what to do about it; printed without a traceback."""
