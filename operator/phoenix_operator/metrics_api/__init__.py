"""`phoenix-operator metrics-api`: answers `custom.metrics.k8s.io` for PhoenixModels from Prometheus.

The autoscaler asks the API server, the API server asks here, and what is answered are the recorded series of
`metrics`. Whatever cannot be answered for certain is an error or not there, never 0: then the autoscaler changes
nothing, while a 0 would have it remove pods.
"""
