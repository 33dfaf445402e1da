"""Simulates autoscaling: the HPA controller's arithmetic, a queue model of the replicas, the recorded signals.

Everything here is computed from its arguments: no cluster, no clock, and random numbers only from a seed. `run` is
where to begin.
"""
