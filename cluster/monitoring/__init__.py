"""What Prometheus and Grafana need to watch the service: configuration files, and a dashboard made from our metrics."""
