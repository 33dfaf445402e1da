"""The Phoenix operator: makes a cluster hold what each PhoenixModel asks for, and says truthfully how it stands."""

__version__ = "0.1.0"
