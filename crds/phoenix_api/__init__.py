"""The PhoenixModel API."""
