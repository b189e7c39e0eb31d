"""The decode engine: what evaluation measures, benchmarks time and the server serves."""
