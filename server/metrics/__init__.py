"""What the server counts and shows: Prometheus' metrics, and the log's line of throughput."""
